"""The collectives of a compiled program, read from its text (XLA's HLO)."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program, seen from one device.

    count: how many run, those in a loop once per iteration.
    bytes: of the full arrays that are gathered, reduced, scattered, exchanged or passed on.
    sent: bytes that a device sends by the algorithms that send least: (n - 1) / n of the array for a
        gather, a scatter or an exchange among n devices, twice that for an all-reduce, all of a permute.
    between_hosts: of what is sent, what goes over the network by the device that sends most: of a ring
        through hosts with m devices each, one part in m, as each device's network card carries one of m
        rings; of an exchange, the parts for devices of other hosts.
    asynchronous: how many run while the device goes on with something else.
    exposed: what is sent, of bytes, by the others and by those with no matmul between start and end.
    """

    kind: str
    count: int
    bytes: int
    sent: float
    between_hosts: float = 0.0
    asynchronous: int = 0
    exposed: float = 0.0


def collectives(hlo: str, hosts: Sequence[int] | None = None) -> dict[str, Collective]:
    """The collectives of a compiled program, `compiled.as_text()`, by kind.

    Args:
        hosts: of every device of the program, in its order; None where all are linked.
    """
    program = parse(hlo)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    devices = int(partitions[1]) if partitions else 1
    multiply = _with_matmuls(program)
    totals: dict[str, Collective] = {}
    for execution in executed(program):
        instruction, times = execution.instruction, execution.times
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        sizes = {
            other.name: array_bytes(other.type) for other in execution.computation.instructions
        }
        array = sum(sizes.get(name, 0) for name in operands(instruction))
        groups = replica_groups(instruction.rest, devices)
        group_size = max(map(len, groups))
        if kind == "all-gather":
            array *= group_size
        sent = times * array * _sent_share(kind, group_size)
        between = _between(execution)
        hidden = between is not None and any(map(multiply, between))
        before = totals.get(kind, Collective(kind, 0, 0, 0.0))
        totals[kind] = Collective(
            kind,
            before.count + times,
            before.bytes + times * array,
            before.sent + sent,
            before.between_hosts + sent * _network_share(kind, instruction, groups, hosts),
            before.asynchronous + (0 if between is None else times),
            before.exposed + (0.0 if hidden else sent),
        )
    return {kind: totals[kind] for kind in KINDS if kind in totals}


def _sent_share(kind: str, devices: int) -> float:
    """What a device sends, as a fraction of the array."""
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices


def _network_share(
    kind: str,
    instruction: Instruction,
    groups: Sequence[Sequence[int]],
    hosts: Sequence[int] | None,
) -> float:
    """Of what a device sends, the part that goes to other hosts, in the group where it is largest."""
    if hosts is None:
        return 0.0
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.rest)
    if pairs is not None:
        ends = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
        return float(any(hosts[source] != hosts[target] for source, target in ends))

    def share(group: Sequence[int]) -> float:
        spanned = [hosts[device] for device in group]
        fewest = min(map(spanned.count, set(spanned)))
        if fewest == len(group):
            return 0.0
        return (len(group) - fewest) / (len(group) - 1) if kind == "all-to-all" else 1 / fewest

    return max(map(share, groups))


def _between(execution: Execution) -> Sequence[Instruction] | None:
    """What is scheduled between the start and the end of an asynchronous instruction; None for others."""
    start, instructions = execution.at, execution.scheduled.instructions
    if not start.opcode.endswith("-start") or '"is_sync":true' in start.rest:
        return None
    first = instructions.index(start) + 1
    for last, other in enumerate(instructions[first:], first):
        if other.opcode.endswith("-done") and start.name in operands(other):
            return instructions[first:last] or None
    return None


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
