"""What would make a plan fit, or faster, by the estimate."""

import itertools
import math
from dataclasses import replace

from llama_jax.config import LlamaConfig
from llama_jax.numerics.remat_policy import Remat
from llama_jax.sharding import BATCH_AXES
from train.options import RunOptions
from train.plan.compiled import Plan
from train.plan.estimate import Estimate, Model, estimate, measure
from train.program.mesh import divisors


def advice(plan: Plan, options: RunOptions, config: LlamaConfig) -> list[str]:
    """Sentences, the most helpful first; none without a data sheet, or if XLA named no amount of memory."""
    chip = plan.chip
    if chip is None or math.isnan(plan.peak):
        return []
    measured = measure(config, plan.sequence_length)
    # what is suggested may leave fewer rows to a micro-batch
    options = replace(options, mesh=replace(options.mesh, stage_micro_batches=None))
    if not plan.fits:
        return _to_fit(plan, options, measured, plan.peak - chip.usable_memory)
    limits = plan.roofline
    assert limits is not None
    if limits.links > limits.compute:
        ratio = limits.links / limits.compute
        remedy = _to_send_less(plan, options, measured) or _to_balance(plan, ratio)
        return [f"communication takes {ratio:.1f} x the time of the matmuls; {remedy}"]
    if plan.remat == "full":
        largest_factor = int(limits.compute / limits.links) if limits.links else 1
        free = chip.usable_memory - plan.peak
        return _to_recompute_less(plan, options, measured, free, max(largest_factor, 1))
    return []


def _to_send_less(plan: Plan, options: RunOptions, measured: Model) -> str | None:
    """A mesh that takes less time for communication and fits, or None."""
    if plan.mesh["tensor"] > 1:
        return f"a smaller --mesh.tensor than {plan.mesh['tensor']} sends less"
    chip = plan.chip
    assert chip is not None

    def cost(replicas: int) -> Estimate:
        sizes = {**plan.mesh, "data": plan.mesh["data"] * replicas}
        sizes["fsdp"] //= replicas
        return estimate(options, measured, sizes, chip, plan.devices // plan.hosts)

    # replicas of the model on parts of the hosts: then weights are gathered from fewer of them
    now, free = cost(1), chip.usable_memory - plan.peak
    costs = {n: cost(n) for n in divisors(plan.hosts) if plan.mesh["fsdp"] % n == 0}
    fitting = [n for n in costs if costs[n].peak - now.peak <= free]
    best = min(fitting, key=lambda n: costs[n].links)
    if best == 1:
        return None
    return (
        f"--mesh.data {plan.mesh['data'] * best} --mesh.fsdp {plan.mesh['fsdp'] // best} would take about "
        f"{costs[best].links / now.links:.0%} of its time"
    )


def _to_balance(plan: Plan, ratio: float) -> str:
    shards = _batch_shards(plan)
    rows = math.ceil(plan.batch_size / plan.micro_batches * ratio / shards) * shards
    return f"traffic hardly depends on the rows, so {rows} rows in a micro-batch would balance them"


def _to_recompute_less(
    plan: Plan, options: RunOptions, measured: Model, free: float, largest_factor: int
) -> list[str]:
    """Recompute less, with as few micro-batches as leave memory for what would be kept.

    Args:
        free: bytes of a device that the plan leaves unused.
        largest_factor: by which micro-batches may be multiplied; each gathers the weights anew.
    """
    kept = _activations(options, measured, plan)
    saved = 1 - plan.flops_per_token / plan.counted_flops_per_token
    cheaper: tuple[Remat, ...] = ("none", "dots")
    for factor, remat in itertools.product(divisors(_rows(plan)), cheaper):
        micro_batches = plan.micro_batches * factor
        model = replace(options.model, remat=remat, remat_save=(), remat_offload=())
        candidate = replace(options, model=model, micro_batches=micro_batches)
        added = _activations(candidate, measured, plan) - kept
        if factor <= largest_factor and added <= free:
            flags = f"--model.remat {remat}"
            if factor > 1:
                flags += f" --micro-batches {micro_batches}"
            amount = f"{_gib(abs(added))} {'more' if added > 0 else 'less'}"
            return [f"{flags} would keep about {amount} and save up to {saved:.0%} of the FLOPs"]
    return []


def _to_fit(plan: Plan, options: RunOptions, measured: Model, missing: float) -> list[str]:
    """What saves memory, each with how much of `missing` bytes it saves."""
    chip = plan.chip
    assert chip is not None
    sizes, sentences = plan.mesh, []
    estimated = estimate(options, measured, sizes, chip)
    state = estimated.state + estimated.gradients

    def suggest(flags: str, saved: float) -> None:
        enough = "which is enough" if saved >= missing else f"of {_gib(missing)} missing"
        sentences.append(f"{flags} would save about {_gib(saved)}, {enough}")

    if sizes["data"] > 1:
        saved = state * (1 - 1 / sizes["data"])
        suggest(f"--mesh.data 1 --mesh.fsdp {sizes['data'] * sizes['fsdp']}", saved)
    if options.model.remat != "full":
        full = replace(options, model=replace(options.model, remat="full"))
        saved = estimated.activations - _activations(full, measured, plan)
        suggest("--model.remat full", saved)
    factors = divisors(_rows(plan))[1:]
    if factors:
        # the fewest micro-batches that save enough, or as many as there are rows
        enough = (n for n in factors if estimated.activations * (1 - 1 / n) >= missing)
        factor = next(enough, factors[-1])
        suggest(
            f"--micro-batches {plan.micro_batches * factor}",
            estimated.activations * (1 - 1 / factor),
        )
    elif sizes["fsdp"] % 2 == 0 and plan.sequence_length % (256 * sizes["sequence"]) == 0:
        # only the sequence axis can split a row, and it splits the weights as well
        wider = {**sizes, "fsdp": sizes["fsdp"] // 2, "sequence": sizes["sequence"] * 2}
        smaller = replace(options, micro_batches=plan.micro_batches * 2)
        if plan.batch_size % smaller.micro_batches == 0:
            saved = estimated.peak - estimate(smaller, measured, wider, chip).peak
            suggest(
                f"--mesh.sequence {wider['sequence']} --mesh.fsdp {wider['fsdp']} --micro-batches "
                f"{smaller.micro_batches}",
                saved,
            )
    names = options.model.remat_offload
    if options.model.remat == "full" and "input" not in names and sizes["stage"] == 1:
        model = replace(options.model, remat_offload=(*names, "input"))
        saved = estimated.activations - _activations(replace(options, model=model), measured, plan)
        suggest(f"--model.remat-offload {' '.join(model.remat_offload)}", saved)
    # of GPUs, a plan cannot tell what it saves
    if not options.optimizer.offload and plan.device_kind.startswith("TPU"):
        optimizer = replace(options.optimizer, offload=True)
        moved = estimate(replace(options, optimizer=optimizer), measured, sizes, chip)
        suggest("--optimizer.offload", estimated.state - moved.state)
    all_state = estimated.state * math.prod(sizes.values()) / sizes["data"]
    if all_state / plan.devices > chip.usable_memory:
        sentences.append(
            f"parameters and optimizer state alone take {_gib(all_state)}: use at least "
            f"{math.ceil(all_state / chip.usable_memory)} devices"
        )
    return sentences


def _rows(plan: Plan) -> int:
    """Rows of a micro-batch on one device."""
    return plan.batch_size // plan.micro_batches // _batch_shards(plan)


def _batch_shards(plan: Plan) -> int:
    return math.prod(plan.mesh[axis] for axis in BATCH_AXES)


def _activations(options: RunOptions, measured: Model, plan: Plan) -> float:
    return estimate(options, measured, plan.mesh, plan.chip).activations


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
