"""What a step costs on devices you need not have: the run's own program, compiled for them.

Nothing runs and no parameter is allocated, so a laptop can plan for a pod.
"""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.attention.masks import causal_shares
from llama_jax.attention.splash import visited_shares
from llama_jax.config import LlamaConfig
from llama_jax.inspection.architecture import forward_flops_per_token
from llama_jax.models.pipeline import Pipeline
from llama_jax.numerics.remat_policy import KeptName, OffloadedName, Remat
from train.data.batch import Batch
from train.hardware.chips import CHIPS, Chip
from train.hardware.collectives import Collective, by_kind
from train.hardware.flops import matmul_flops
from train.hardware.links import Traffic, hosts_of, traffic
from train.hardware.roofline import Roofline, roofline
from train.hardware.transfers import transfers
from train.options import FsdpGather, RunOptions, SequenceOrder
from train.plan.estimate import estimate, measure
from train.program.build import attention_choice, run_program
from train.program.mesh import count_slices


class Memory(NamedTuple):
    """Bytes of one device.

    parameters, optimizer_state: the device's shards, without padding.
    arguments: of the step: both of these, padded as the device lays them out, and the batch.
    outputs, aliased: what the step returns, and how much of that overwrites arguments.
    temporaries: everything else: activations, gradients, gathered weights. For a TPU it is the sum of
        XLA's buffers, more than is in use at any one time.
    host: what is offloaded, in the memory of the device's host; all other numbers leave it out. XLA's
        compiler for GPUs, ahead of time, and that for CPUs know of no state on the host, and count it as
        arguments.
    """

    parameters: int
    optimizer_state: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    host: int


class Alternative(NamedTuple):
    """A step with the other `MeshOptions.fsdp_gather`, not compiled: bytes that a device holds and sends.

    Those of the compiled step, with the weights' and gradients' part of them exchanged for the estimate's.
    """

    fsdp_gather: FsdpGather
    peak: float
    sent: float


@dataclass(frozen=True)
class Plan:
    """One configuration, compiled. Bytes are of one device, FLOPs per token of all devices together.

    peak: the most memory in use at any time, as XLA reports it; on a CPU, where XLA leaves temporaries
        out, the sum of arguments, new outputs and temporaries; where XLA refuses to compile, what it says
        it would need.
    hosts: groups of devices that are linked to each other: hosts of GPUs, slices of TPUs.
    attention, attention_reason: the implementation, and why it is not a faster one.
    refused: XLA's message if it refused to compile; memory and collectives are then unknown.
    sequence_order: of tokens over the sequence axis. slowest_attention: what the shard of a sequence that
        does most computes in attention's kernel, in units of the mean.
    pipeline: how the layers run over the stages; None for a single one.
    flops_per_token: of the model: 3 x `forward_flops_per_token`. counted_flops_per_token: of every
        matmul in the step, recomputation and idle stages included, as if all devices did as much as the
        slowest.
    alternative: the step with fsdp's other way to gather, by the estimate; None without micro-batches or
        fsdp, and with dropout, which has one way only.
    chip, roofline: None for devices without a data sheet.
    """

    mesh: dict[str, int]
    remat: Remat
    remat_save: tuple[KeptName, ...]
    remat_offload: tuple[OffloadedName, ...]
    batch_size: int
    sequence_length: int
    micro_batches: int
    fsdp_gather: FsdpGather
    compute_dtype: str
    device_kind: str
    devices: int
    hosts: int
    attention: str
    attention_reason: str | None
    sequence_order: SequenceOrder
    slowest_attention: float
    pipeline: Pipeline | None
    flops_per_token: float
    counted_flops_per_token: float
    compile_seconds: float
    peak: float
    fits: bool | None
    refused: str | None
    memory: Memory | None
    collectives: tuple[Collective, ...]
    traffic: tuple[Traffic, ...]
    alternative: Alternative | None
    chip: Chip | None
    roofline: Roofline | None


def make_plan(options: RunOptions, config: LlamaConfig, devices: Sequence[Any]) -> Plan:
    """Compile the step of a run over `devices`.

    Args:
        options: with `model.compute_dtype` filled in.

    Raises:
        ValueError: as `run_program`; XLA cannot compile the step, for another reason than its size.
    """
    program = run_program(options, config, devices)
    dtype, requested = jnp.dtype(options.model.compute_dtype), options.model.attention
    attention = attention_choice(program.config, program.mesh, requested, dtype, program.batch)
    with jax.set_mesh(program.mesh):
        traced = program.step.trace(program.params, program.opt_state, program.batch, _key(config))
        begin = time.perf_counter()
        compiled, refused = None, None
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            refused = _one_line(str(error))
            if devices[0].platform == "gpu":  # where XLA does not look at the size of the memory
                raise ValueError(
                    f"XLA cannot compile this step for {devices[0].device_kind}: {refused}"
                ) from None
        seconds = time.perf_counter() - begin
    tokens = options.batch_size * options.sequence_length
    shards = program.mesh.shape["sequence"]
    share, slowest = kernel_work(attention.implementation, program.batch, shards)
    counted = matmul_flops(traced.jaxpr.jaxpr, share, slowest)
    model_flops = 3 * forward_flops_per_token(config, options.sequence_length)
    kind = devices[0].device_kind
    chip = CHIPS.get(kind)
    state = device_bytes(program.params), device_bytes(program.opt_state)
    memory: Memory | None = None
    sends: tuple[Collective, ...] = ()
    links: tuple[Traffic, ...] = ()
    if compiled is None:
        assert refused is not None
        peak = _bytes_needed(refused, sum(state))
    else:
        stats = compiled.memory_analysis()
        memory = Memory(
            *state,
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
        )
        total = memory.arguments + memory.outputs - memory.aliased + memory.temporaries
        reported = devices[0].platform != "cpu" and stats.peak_memory_in_bytes
        peak = reported or total
        found = list(transfers(compiled.as_text()))
        sends = tuple(by_kind(found, hosts_of(list(program.mesh.devices.flat))).values())
        links = traffic(found, program.mesh)
    limits = None
    if chip is not None and memory is not None:
        limits = roofline(
            chip,
            model_flops=model_flops * tokens / len(devices),
            flops=counted / len(devices),
            moved=2 * peak,
            sent=sum(collective.sent for collective in sends),
            between_hosts=sum(collective.between_hosts for collective in sends),
        )
    fits = None if chip is None else refused is None and peak <= chip.usable_memory
    return Plan(
        mesh=dict(program.mesh.shape),
        remat=options.model.remat,
        remat_save=options.model.remat_save,
        remat_offload=options.model.remat_offload,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        micro_batches=options.micro_batches,
        fsdp_gather=options.mesh.fsdp_gather,
        compute_dtype=str(options.model.compute_dtype),
        device_kind=kind,
        devices=len(devices),
        hosts=count_slices(devices),
        attention=attention.implementation,
        attention_reason=attention.reason,
        sequence_order=options.mesh.sequence_order,
        slowest_attention=slowest,
        pipeline=program.pipeline,
        flops_per_token=model_flops,
        counted_flops_per_token=counted / tokens,
        compile_seconds=seconds,
        peak=peak,
        fits=fits,
        refused=refused,
        memory=memory,
        collectives=sends,
        traffic=links,
        alternative=None
        if compiled is None
        else _alternative(options, config, program.mesh, peak, links),
        chip=chip,
        roofline=limits,
    )


def _alternative(
    options: RunOptions, config: LlamaConfig, mesh: Mesh, peak: float, links: Sequence[Traffic]
) -> Alternative | None:
    if options.micro_batches == 1 or mesh.shape["fsdp"] == 1 or config.attention_dropout:
        return None
    other: FsdpGather = "layer" if options.mesh.fsdp_gather == "step" else "step"
    model = measure(config, options.sequence_length)
    now, then = (
        estimate(
            replace(options, mesh=replace(options.mesh, fsdp_gather=gather)),
            model,
            mesh.shape,
            None,
        )
        for gather in (options.mesh.fsdp_gather, other)
    )
    kept = sum(row.sent for row in links if "fsdp" not in row.axes)
    return Alternative(other, peak + then.gradients - now.gradients, kept + then.weights_sent)


def remat_in_words(plan: Plan) -> str:
    """The remat policy, with what is kept by name."""
    words = [plan.remat, *plan.remat_save]
    return " + ".join([*words, *(f"{name} (host)" for name in plan.remat_offload)])


def device_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def kernel_work(attention: str, batch: Batch, shards: int) -> tuple[float, float]:
    """What attention's kernel computes of its grid, and what the slowest of the shards does over the mean.

    Args:
        batch: abstract; documents, whose lengths are not known, count as one per row.
    """
    length = batch.input_ids.shape[2]
    if attention == "splash":
        shares = visited_shares(length, shards, batch.order)
        return float(shares.mean()), float(shares.max() / shares.mean())
    if attention == "triton":  # whose grid is estimated, of the mean shard
        shares = causal_shares(length, shards, batch.order)
        return 1.0, float(shares.max() / shares.mean())
    return 1.0, 1.0  # nothing is skipped


def _key(config: LlamaConfig) -> Any:
    """The abstract dropout key of a step; None if the model has no dropout."""
    return jax.eval_shape(lambda: jax.random.key(0)) if config.attention_dropout else None


_UNITS = {"B": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def _bytes_needed(refused: str, state: int) -> float:
    """The first amount in XLA's message, plus the state if it speaks of temporaries only."""
    amount = re.search(r"\b([\d.]+)([KMGTB])\b", refused)
    if amount is None:
        return math.nan
    needed = float(amount[1]) * _UNITS[amount[2]]
    return needed + state if "temporaries" in refused else needed


def _one_line(message: str, limit: int = 240) -> str:
    text = " ".join(message.split())
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."
