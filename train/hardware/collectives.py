"""The collectives of a compiled program, read from its text (XLA's HLO)."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
    between_hosts: of what is sent, what goes over the network: of a ring through h hosts with m devices
        each, one part in m, as each device's network card carries one of m rings.
    asynchronous: how many have a start and an end of their own. exposed: what is sent, of bytes, by those
        without one and by those with no matmul between the two.
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

    A loop's trip count is the one that the compiler found, or the bound that its counter is compared
    with; a loop with neither counts once.

    Args:
        hosts: of every device of the program, in its order; None where all are linked.
    """
    program = _parse(hlo)
    devices = re.search(r"num_partitions=(\d+)", hlo)
    all_devices = int(devices[1]) if devices else 1
    multiply = _with_matmuls(program)
    totals: dict[str, Collective] = {}
    for computation, instruction, times in _executed(program):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        sizes = {other.name: _bytes(other.type) for other in computation.instructions}
        operands = sum(sizes.get(name, 0) for name in _operands(instruction))
        group = _group(instruction.rest, all_devices)
        array = operands * len(group) if kind == "all-gather" else operands
        share = {"all-reduce": 2.0, "collective-permute": 1.0}.get(kind, 1.0)
        if kind != "collective-permute":
            share *= (len(group) - 1) / len(group)
        sent = times * array * share
        end = _end_of(computation, instruction)
        hidden = end is not None and any(
            multiply(between) for between in _between(computation, instruction, end)
        )
        before = totals.get(kind, Collective(kind, 0, 0, 0.0))
        totals[kind] = Collective(
            kind,
            before.count + times,
            before.bytes + times * array,
            before.sent + sent,
            before.between_hosts + sent * _network_share(instruction, group, hosts),
            before.asynchronous + (times if end is not None else 0),
            before.exposed + (0.0 if hidden else sent),
        )
    return {kind: totals[kind] for kind in KINDS if kind in totals}


def _network_share(
    instruction: "_Instruction", group: Sequence[int], hosts: Sequence[int] | None
) -> float:
    """Of what a device sends, the part that goes to other hosts."""
    if hosts is None:
        return 0.0
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.rest)
    if pairs is not None:
        ends = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
        return float(any(hosts[source] != hosts[target] for source, target in ends))
    spanned = {hosts[device] for device in group}
    return 0.0 if len(spanned) == 1 else len(spanned) / len(group)


class _Instruction(NamedTuple):
    """`name = type opcode(operands), attributes`; rest is what follows the parenthesis."""

    name: str
    type: str
    opcode: str
    rest: str


class _Computation(NamedTuple):
    name: str
    entry: bool
    instructions: list[_Instruction]


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*-> .*\{$")
# the type of an asynchronous operation is a tuple of tuples
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def _parse(hlo: str) -> dict[str, _Computation]:
    program: dict[str, _Computation] = {}
    instructions: list[_Instruction] = []
    for line in hlo.splitlines():
        head = _COMPUTATION.match(line)
        if head is not None:
            instructions = []
            program[head[2]] = _Computation(head[2], head[1] is not None, instructions)
            continue
        match = _INSTRUCTION.match(line)
        if match is not None:
            instructions.append(_Instruction(*match.groups()))
    return program


def _operands(instruction: _Instruction) -> list[str]:
    """The names between its parentheses, which hold no others where a collective's are."""
    inside, _, _ = instruction.rest.partition(")")
    return re.findall(r"%([\w.-]+)", inside)


def _executed(
    program: dict[str, _Computation],
) -> Iterator[tuple[_Computation, _Instruction, int]]:
    """Every instruction that runs, with how many times it does."""

    def visit(name: str, times: int) -> Iterator[tuple[_Computation, _Instruction, int]]:
        computation = program[name]
        for instruction in computation.instructions:
            yield computation, instruction, times
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # its -start has been counted
            repeats = _trip_count(program, instruction) if instruction.opcode == "while" else 1
            for called in _called(instruction):
                if called in program:
                    yield from visit(called, times * repeats)

    for computation in program.values():
        if computation.entry:
            yield from visit(computation.name, 1)


def _called(instruction: _Instruction) -> list[str]:
    called = _CALLED.findall(instruction.rest)
    for names in _BRANCHES.findall(instruction.rest):
        called += re.findall(r"%?([\w.-]+)", names)
    return called


def _trip_count(program: dict[str, _Computation], loop: _Instruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known is not None:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    assert condition is not None
    # a scan's counter goes from 0 to the only constant in its condition
    bounds = [
        int(value[1])
        for instruction in program[condition[1]].instructions
        if instruction.opcode == "constant" and (value := re.match(r"(\d+)\)", instruction.rest))
    ]
    return bounds[0] if len(bounds) == 1 else 1


# bits of an element; "token" and the like have none
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}


def _bytes(type_text: str) -> int:
    total = 0
    for name, shape in _ARRAY.findall(type_text):
        digits = re.match(r"[suf](\d+)", name)
        bits = _BITS.get(name, int(digits[1]) if digits else 0)
        total += math.prod(int(size) for size in shape.split(",") if size) * bits // 8
    return total


def _group(text: str, all_devices: int) -> list[int]:
    """The first group of devices that take part; groups are written in three ways."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed is not None:
        return list(map(int, listed[1].split(",")))
    shaped = re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if shaped is not None:
        shape = list(map(int, shaped[2].split(",")))
        order = list(map(int, shaped[3].split(","))) if shaped[3] else list(range(len(shape)))
        devices = np.arange(math.prod(shape)).reshape(shape).transpose(order)
        return devices.reshape(-1, int(shaped[1]))[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if named is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        # a part of an axis is written 'axis':(what lies outside of it)its size
        axes = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[2])
        parts = {name: (int(outer or 1), int(size or sizes[name])) for name, outer, size in axes}
        group = np.zeros(1, int)
        for name, size in sizes.items():
            outer, count = parts.get(name, (1, 1))
            offsets = np.arange(count) * (size // (outer * count))
            group = (group[:, None] * size + offsets).reshape(-1)
        return group.tolist()
    return list(range(all_devices))


def _with_matmuls(program: dict[str, _Computation]) -> Callable[[_Instruction], bool]:
    """Whether an instruction multiplies matrices, itself or in what it calls."""

    @functools.cache
    def computes(name: str) -> bool:
        return any(multiplies(instruction) for instruction in program[name].instructions)

    def multiplies(instruction: _Instruction) -> bool:
        if instruction.opcode in ("dot", "convolution"):
            return True
        if instruction.opcode == "custom-call":
            return any(name in instruction.rest for name in _MATMUL_TARGETS)
        return any(computes(name) for name in _called(instruction) if name in program)

    return multiplies


# cuBLAS, and the kernels of Pallas: attention
_MATMUL_TARGETS = ("__cublas", "__gpu$xla.gpu.triton", "mosaic", "tpu_custom_call")


def _end_of(computation: _Computation, start: _Instruction) -> _Instruction | None:
    """The `-done` of an asynchronous instruction."""
    if not start.opcode.endswith("-start"):
        return None
    ends = (
        other
        for other in computation.instructions
        if other.opcode.endswith("-done") and start.name in _operands(other)
    )
    return next(ends, None)


def _between(
    computation: _Computation, start: _Instruction, end: _Instruction
) -> list[_Instruction]:
    """The instructions scheduled between the two."""
    instructions = computation.instructions
    return instructions[instructions.index(start) + 1 : instructions.index(end)]
