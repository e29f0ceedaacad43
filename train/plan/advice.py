"""What would make a plan fit, or faster, reckoned from its own figures."""

import itertools
import math
from dataclasses import replace

from llama_jax.config import LlamaConfig
from llama_jax.numerics.remat import Remat
from train.options import RunOptions
from train.plan.compiled import Plan
from train.plan.estimate import Model, estimate, measure


def advice(plan: Plan, options: RunOptions, config: LlamaConfig) -> list[str]:
    """Sentences, the most helpful first; none without a data sheet, or where XLA named no amount."""
    chip = plan.chip
    if chip is None or math.isnan(plan.peak):
        return []
    measured = measure(config, plan.sequence_length)
    if not plan.fits:
        return _to_fit(plan, options, measured, plan.peak - chip.memory)
    line = plan.roofline
    assert line is not None
    found = []
    if line.links > line.compute:
        ratio = line.links / line.compute
        rows = math.ceil(plan.batch_size / plan.micro_batches * ratio)
        cure = (
            f"a smaller --mesh.tensor than {plan.mesh['tensor']} sends less"
            if plan.mesh["tensor"] > 1
            else f"what is sent hardly depends on the rows: {rows} of them in a micro-batch level the two"
        )
        found.append(f"the links take {ratio:.1f} x the time of the products; {cure}")
    elif plan.remat == "full":
        most = int(line.compute / line.links) if line.links else 1
        room = chip.memory - plan.peak
        found += _to_recompute_less(plan, options, measured, room, max(most, 1))
    return found


def _to_recompute_less(
    plan: Plan, options: RunOptions, measured: Model, room: float, most: int
) -> list[str]:
    """With the fewest micro-batches that make room for what would be kept.

    Args:
        most: times the micro-batches of now; each gathers the weights anew.
    """
    kept = _activations(options, measured, plan)
    saved = 1 - plan.flops_per_token / plan.counted_flops_per_token
    fewer: tuple[Remat, ...] = ("none", "dots")
    for times, remat in itertools.product(_divisors(_rows(plan)), fewer):
        parts = plan.micro_batches * times
        changed = replace(options, model=replace(options.model, remat=remat), micro_batches=parts)
        added = _activations(changed, measured, plan) - kept
        if times <= most and added <= room:
            flags = f"--model.remat {remat}" + (f" --micro-batches {parts}" if times > 1 else "")
            amount = f"{_gib(abs(added))} {'more' if added > 0 else 'less'}"
            return [f"{flags} would keep about {amount} and save up to {saved:.0%} of the FLOPs"]
    return []


def _to_fit(plan: Plan, options: RunOptions, measured: Model, missing: float) -> list[str]:
    chip = plan.chip
    assert chip is not None
    sizes, found = plan.mesh, []
    estimated = estimate(options, measured, sizes, chip)
    state = estimated.state + estimated.gradients

    def say(text: str, saved: float) -> None:
        enough = "which is enough" if saved >= missing else f"of {_gib(missing)} missing"
        found.append(f"{text} would save about {_gib(saved)}, {enough}")

    if sizes["data"] > 1:
        saved = state * (1 - 1 / sizes["data"])
        say(f"--mesh.data 1 --mesh.fsdp {sizes['data'] * sizes['fsdp']}", saved)
    if options.model.remat != "full":
        full = replace(options, model=replace(options.model, remat="full"))
        saved = estimated.activations - _activations(full, measured, plan)
        say("--model.remat full", saved)
    divisors = _divisors(_rows(plan))[1:]
    if divisors:
        # the fewest more parts that do, or as many as there are rows
        enough = (n for n in divisors if estimated.activations * (1 - 1 / n) >= missing)
        times = next(enough, divisors[-1])
        say(
            f"--micro-batches {plan.micro_batches * times}",
            estimated.activations * (1 - 1 / times),
        )
    elif sizes["fsdp"] % 2 == 0 and plan.sequence_length % (256 * sizes["sequence"]) == 0:
        # a row cannot be had in parts but over the sequence axis, which splits the weights as well
        wider = {**sizes, "fsdp": sizes["fsdp"] // 2, "sequence": sizes["sequence"] * 2}
        fewer = replace(options, micro_batches=plan.micro_batches * 2)
        if plan.batch_size % fewer.micro_batches == 0:
            saved = estimated.peak - estimate(fewer, measured, wider, chip).peak
            say(
                f"--mesh.sequence {wider['sequence']} --mesh.fsdp {wider['fsdp']} --micro-batches "
                f"{fewer.micro_batches}",
                saved,
            )
    everything = estimated.state * math.prod(sizes[axis] for axis in ("fsdp", "sequence", "tensor"))
    if everything / plan.devices > chip.memory:
        found.append(
            f"parameters and optimizer state alone are {_gib(everything)}: at least "
            f"{math.ceil(everything / chip.memory)} devices"
        )
    return found


def _rows(plan: Plan) -> int:
    """Of a micro-batch, on one device."""
    return plan.batch_size // plan.micro_batches // (plan.mesh["data"] * plan.mesh["fsdp"])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _activations(options: RunOptions, measured: Model, plan: Plan) -> float:
    return estimate(options, measured, plan.mesh, plan.chip).activations


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
