"""Every collective of a compiled program: what it sends, among whom, and whether a matmul hides it."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from train.hardware.hlo import (
    Computation,
    Execution,
    Instruction,
    array_bytes,
    called_by,
    executed,
    operands,
    parse,
    replica_groups,
)

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


class Transfer(NamedTuple):
    """A collective, as often as it runs, seen from one device.

    times: how often that is.
    bytes: of the full arrays that are gathered, reduced, scattered, exchanged or passed on.
    sent: bytes that a device sends by the algorithms that send least: (n - 1) / n of the array for a
        gather, a scatter or an exchange among n devices, twice that for an all-reduce, all of a permute.
    groups: devices that take part together, by their number in the program; of a permute, the pairs of
        sources and targets.
    between_slices: of TPUs, over the network; the groups are then not known.
    asynchronous: the device goes on with something else meanwhile. hidden: with a matmul.
    """

    kind: str
    times: int
    bytes: int
    sent: float
    groups: Sequence[Sequence[int]]
    between_slices: bool
    asynchronous: bool
    hidden: bool


def transfers(hlo: str) -> Iterator[Transfer]:
    """The collectives of a compiled program, `compiled.as_text()`."""
    program = parse(hlo)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    devices = int(partitions[1]) if partitions else 1
    multiplies = _with_matmuls(program)
    stages = _fused_stages(program)
    for execution in executed(program):
        instruction = execution.instruction
        if instruction.opcode == "send" and _MEGASCALE in instruction.rest:
            yield _between_slices(execution, multiplies)
            continue
        kind = collective_kind(instruction)
        if kind is None:
            continue
        overlapped: Sequence[Instruction] | None
        if execution.at.opcode == "fusion":
            fusions = stages(execution)
            scheduled = execution.scheduled.instructions
            if execution.at is not scheduled[fusions[0]]:
                continue  # a later stage of a collective that has been counted
            # the stages between the first and the last multiply matrices themselves
            overlapped = scheduled[fusions[0] : fusions[-1] + 1] if len(fusions) > 1 else None
        else:
            overlapped = _until_done(execution)
        if kind == "all-reduce" and execution.computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # how TPUs write it: the all-reduce of which a part is kept
        array = sum(_operand_bytes(execution))
        groups = replica_groups(instruction.rest, devices)
        if kind == "collective-permute":
            groups = _pairs(instruction)
            if all(len(pair) == 2 and pair[0] == pair[1] for pair in groups):
                continue  # what every device keeps; part of a permute between slices
        size = max(map(len, groups))
        if kind == "all-gather":
            array *= size
        yield Transfer(
            kind=kind,
            times=execution.times,
            bytes=execution.times * array,
            sent=execution.times * array * _sent_share(kind, size),
            groups=groups,
            between_slices=False,
            asynchronous=overlapped is not None,
            hidden=overlapped is not None and any(map(multiplies, overlapped)),
        )


def collective_kind(instruction: Instruction) -> str | None:
    """The kind of a collective, or of its start; None for any other instruction."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _sent_share(kind: str, devices: int) -> float:
    """What a device sends, as a fraction of the array."""
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices


def _operand_bytes(execution: Execution) -> list[int]:
    sizes = {other.name: array_bytes(other.type) for other in execution.computation.instructions}
    return [sizes.get(name, 0) for name in operands(execution.instruction)]


def _pairs(permute: Instruction) -> list[list[int]]:
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", permute.rest)
    ends = re.findall(r"(\d+),(\d+)", pairs[1]) if pairs else []
    return [[int(source), int(target)] for source, target in ends] or [[0]]


def _until_done(execution: Execution) -> Sequence[Instruction] | None:
    """What is scheduled between the start and the end of an asynchronous instruction; None for others."""
    start, instructions = execution.at, execution.scheduled.instructions
    if not start.opcode.endswith("-start") or '"is_sync":true' in start.rest:
        return None
    first = instructions.index(start) + 1
    for last, other in enumerate(instructions[first:], first):
        if other.opcode.endswith("-done") and start.name in operands(other):
            return instructions[first:last] or None
    return None


def _fused_stages(program: dict[str, Computation]) -> Callable[[Execution], list[int]]:
    """Where the fusions are scheduled that one collective is spread over.

    TPUs fuse a collective that they run beside matmuls into several fusions, each of which names it again:
    one that starts it (AsyncCollectiveStart), one for each matmul, and one that ends it.
    """

    @functools.cache
    def channels(name: str) -> dict[str, list[int]]:
        places: dict[str, list[int]] = {}
        for place, fusion in enumerate(program[name].instructions):
            if fusion.opcode == "fusion":
                called = [program[other] for other in called_by(fusion) if other in program]
                inner = [each for computation in called for each in computation.instructions]
                for channel in {_channel(each) for each in inner if collective_kind(each)}:
                    places.setdefault(channel, []).append(place)
        return places

    def stages(execution: Execution) -> list[int]:
        channel = _channel(execution.instruction)
        return channels(execution.scheduled.name).get(channel) or [
            execution.scheduled.instructions.index(execution.at)
        ]

    return stages


def _channel(instruction: Instruction) -> str:
    channel = re.search(r"channel_id=(\d+)", instruction.rest)
    return instruction.name if channel is None else channel[1]


_MEGASCALE = '_xla_host_transfer_handler_name="xla_megascale_runtime"'


def _between_slices(execution: Execution, multiplies: Callable[[Instruction], bool]) -> Transfer:
    """A collective among devices in the same place of several slices, which their hosts carry out.

    A `send` to the host and a `recv` of the result. XLA names the slices where they are all slices;
    otherwise their number follows from the sizes of a gather or a scatter, and is taken as two, the
    fewest, for what keeps its size.
    """
    send, instructions = execution.instruction, execution.scheduled.instructions
    sent, received = _operand_bytes(execution)[0], 0
    rendezvous = _attribute(send, "_xla_host_transfer_rendezvous")
    overlapped: Sequence[Instruction] = ()
    for other in instructions:
        if _attribute(other, "_xla_host_transfer_rendezvous") != rendezvous:
            continue
        if other.opcode == "recv":
            received = array_bytes(other.type.partition("}")[0])
        if other.opcode == "recv-done":
            overlapped = instructions[instructions.index(send) + 1 : instructions.index(other)]
    kind = (_attribute(send, "_xla_megascale_transfer_type") or "").lower().replace("_", "-")
    kind = kind if kind in KINDS else "collective-permute"
    array = max(sent, received)
    named = re.match(r"\{([\d,]+)\}", _attribute(send, "_xla_megascale_target") or "")
    parts = array // min(sent, received) if min(sent, received) else 1
    slices = named[1].count(",") + 1 if named else max(parts, 2)
    return Transfer(
        kind=kind,
        times=execution.times,
        bytes=execution.times * array,
        sent=execution.times * array * _sent_share(kind, slices),
        groups=(),
        between_slices=True,
        asynchronous=bool(overlapped),
        hidden=any(map(multiplies, overlapped)),
    )


def _attribute(instruction: Instruction, name: str) -> str | None:
    value = re.search(rf'{name}="([^"]*)"', instruction.rest)
    return None if value is None else value[1]


# cuBLAS, cuDNN's attention, and kernels of Pallas
_MATMUL_TARGETS = ("__cublas", "__cudnn", "__gpu$xla.gpu.triton", "mosaic_gpu", "tpu_custom_call")


def _with_matmuls(program: dict[str, Computation]) -> Callable[[Instruction], bool]:
    """Whether an instruction multiplies matrices, itself or in what it calls."""

    @functools.cache
    def computes(name: str) -> bool:
        return any(multiplies(instruction) for instruction in program[name].instructions)

    def multiplies(instruction: Instruction) -> bool:
        if instruction.opcode in ("dot", "convolution"):
            return True
        if instruction.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            return target is not None and target[1].startswith(_MATMUL_TARGETS)
        return any(computes(name) for name in called_by(instruction) if name in program)

    return multiplies
