"""What would make a plan fit, or faster, reckoned from its own figures."""

import math
from dataclasses import replace

from llama_jax.config import LlamaConfig
from train.config import RunOptions
from train.plan import Plan
from train.plan_estimate import estimate


def advice(plan: Plan, options: RunOptions, config: LlamaConfig) -> list[str]:
    """Sentences, the most helpful first; none for devices without a data sheet."""
    chip = plan.chip
    if chip is None:
        return []
    if not plan.fits:
        return _to_fit(plan, options, config, plan.peak - chip.memory)
    line = plan.roofline
    assert line is not None
    found = []
    if line.links > line.compute:
        needed = math.ceil(plan.batch_size * line.links / line.compute)
        found.append(
            f"links take {line.links / line.compute:.1f} x the time of the products: they are level from "
            f"about {needed} rows a batch on, if each is one more of a micro-batch"
        )
    if options.model.remat == "full":
        for remat in ("none", "dots"):
            more = replace(options, model=replace(options.model, remat=remat))
            added = _activations(more, config, plan) - _activations(options, config, plan)
            if plan.peak + added <= chip.memory:
                saved = 1 - plan.flops_per_token / plan.counted_flops_per_token
                found.append(
                    f"--model.remat {remat} would keep about {_gib(added)} more, which fits, and save "
                    f"up to {saved:.0%} of the FLOPs"
                )
                break
    return found


def _to_fit(plan: Plan, options: RunOptions, config: LlamaConfig, missing: float) -> list[str]:
    chip = plan.chip
    assert chip is not None
    sizes, found = plan.mesh, []
    estimated = estimate(options, config, sizes, chip)
    state = estimated.state + estimated.gradients

    def say(text: str, saved: float) -> None:
        enough = (
            "which is enough" if saved >= missing else f"of the {_gib(missing)} that are missing"
        )
        found.append(f"{text} would save about {_gib(saved)}, {enough}")

    if sizes["data"] > 1:
        saved = state * (1 - 1 / sizes["data"])
        say(f"--mesh.data 1 --mesh.fsdp {sizes['data'] * sizes['fsdp']}", saved)
    if options.model.remat != "full":
        full = replace(options, model=replace(options.model, remat="full"))
        saved = estimated.activations - _activations(full, config, plan)
        say("--model.remat full", saved)
    rows = plan.batch_size // plan.micro_batches // (sizes["data"] * sizes["fsdp"])
    if rows > 1:
        # the fewest more parts that do, or as many as there are rows
        divisors = [n for n in range(2, rows + 1) if rows % n == 0]
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
            saved = estimated.peak - estimate(fewer, config, wider, chip).peak
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


def _activations(options: RunOptions, config: LlamaConfig, plan: Plan) -> float:
    return estimate(options, config, plan.mesh, plan.chip).activations


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
