"""Search for a mesh and a remat policy: order candidates by estimate, compile the first few, rank those."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

from llama_jax.config import LlamaConfig
from llama_jax.numerics.remat_policy import Remat
from train.hardware.chips import CHIPS
from train.options import RunOptions
from train.plan.compiled import Plan, make_plan
from train.plan.estimate import estimate, measure
from train.program.mesh import count_slices, divisors, spans_slices

# Larger tensor axes leave few heads to a device and make the all-reduces expensive; larger sequence axes
# make the shards of a row short.
LARGEST_TENSOR, LARGEST_SEQUENCE = 16, 16
# tokens; a multiple of a TPU's lanes
SEQUENCE_UNIT = 128


def search(
    options: RunOptions,
    config: LlamaConfig,
    devices: Sequence[Any],
    *,
    limit: int,
    report: Callable[[Plan], None] = lambda plan: None,
) -> list[Plan]:
    """Compile the first `limit` candidates; the best plan comes first.

    Plans that fit come before those that do not, then those with the higher MFU bound (ties go to the
    higher MFU without overlap); on devices without a data sheet those with the lower peak.

    Args:
        report: called with each plan once it is compiled.

    Raises:
        ValueError: a batch that no mesh of the devices divides; a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit: found {limit}, expected at least 1")
    ordered = candidates(options, config, devices)
    if not ordered:
        raise ValueError(
            f"batch-size: found {options.batch_size} rows in {options.micro_batches} micro-batches, "
            f"expected a number that some mesh of {len(devices)} devices divides"
        )
    plans = []
    for candidate in ordered[:limit]:
        plan = make_plan(candidate, config, devices)
        report(plan)
        plans.append(plan)
    return sorted(plans, key=_rank)


def candidates(
    options: RunOptions, config: LlamaConfig, devices: Sequence[Any]
) -> list[RunOptions]:
    """Every mesh with every remat policy, by the estimate: what should fit first, then the fastest.

    Where values are kept by name, with the policy that does so.
    """
    chip = CHIPS.get(devices[0].device_kind)
    memory = math.inf if chip is None else chip.usable_memory
    measured = measure(config, options.sequence_length)
    linked = len(devices) // count_slices(devices)
    ranked = []
    by_name = options.model.remat_policy != options.model.remat
    policies = [options.model.remat] if by_name else get_args(Remat)
    for sizes in meshes(options, config, len(devices), linked):
        for remat in policies:
            model = replace(options.model, remat=remat)
            mesh: dict[str, Any] = {**sizes}
            candidate = replace(options, model=model, mesh=replace(options.mesh, **mesh))
            cost = estimate(candidate, measured, sizes, chip, linked)
            times = max(cost.compute, cost.links), cost.compute + cost.links
            ranked.append((max(cost.peak / memory, 1.0), *times, candidate))
    return [candidate for *_, candidate in sorted(ranked, key=lambda entry: entry[:3])]


def meshes(
    options: RunOptions, config: LlamaConfig, count: int, linked: int
) -> Iterator[dict[str, int]]:
    """Sizes of all axes that multiply to `count` and divide batch, sequence and heads.

    The stages are those of the options: more only leave devices idle, unless the weights do not fit.

    Args:
        linked: devices of a slice or host, which tensor and sequence axes must not leave.
    """
    rows = options.batch_size // options.micro_batches
    stage = max(options.mesh.stage, 1)
    parts = options.mesh.stage_micro_batches or stage
    factors = divisors(count)
    tensors = [n for n in factors if n <= LARGEST_TENSOR and config.num_attention_heads % n == 0]
    sequences = [
        n
        for n in factors
        if n == 1 or (n <= LARGEST_SEQUENCE and options.sequence_length % (n * SEQUENCE_UNIT) == 0)
    ]
    for tensor, sequence, data in itertools.product(tensors, sequences, factors):
        fsdp, rest = divmod(count, stage * tensor * sequence * data)
        if rest or rows % (data * fsdp * math.lcm(stage, parts)):
            continue
        sizes = {"stage": stage, "data": data, "fsdp": fsdp}
        if spans_slices(sizes, count // linked):
            yield {**sizes, "sequence": sequence, "tensor": tensor}


def _rank(plan: Plan) -> tuple[Any, ...]:
    limits = plan.roofline
    mfu = (0.0, 0.0) if limits is None else (-round(limits.mfu, 3), -limits.mfu_in_turn)
    return plan.fits is False, *mfu, plan.peak
