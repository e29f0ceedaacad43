"""The collectives of a compiled program, read from its text (XLA's HLO)."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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
    """

    kind: str
    count: int
    bytes: int
    sent: float


def collectives(hlo: str) -> dict[str, Collective]:
    """The collectives of a compiled program, `compiled.as_text()`, by kind.

    A loop's trip count is the one that the compiler found, or the bound that its counter is compared
    with; a loop with neither counts once.
    """
    program = _parse(hlo)
    devices = re.search(r"num_partitions=(\d+)", hlo)
    all_devices = int(devices[1]) if devices else 1
    totals: dict[str, Collective] = {}
    for computation, instruction, times in _executed(program):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        sizes = {other.name: _bytes(other.type) for other in computation.instructions}
        operands = sum(sizes.get(name, 0) for name in _operands(instruction))
        group = _group_size(instruction.rest, all_devices)
        array = operands * group if kind == "all-gather" else operands
        share = {"all-reduce": 2.0, "collective-permute": 1.0}.get(kind, 1.0)
        if kind != "collective-permute":
            share *= (group - 1) / group
        before = totals.get(kind, Collective(kind, 0, 0, 0.0))
        totals[kind] = Collective(
            kind,
            before.count + times,
            before.bytes + times * array,
            before.sent + times * array * share,
        )
    return {kind: totals[kind] for kind in KINDS if kind in totals}


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


def _group_size(text: str, all_devices: int) -> int:
    """How many devices take part; groups are written in three ways."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed is not None:
        return listed[1].count(",") + 1
    shaped = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if shaped is not None:
        return int(shaped[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if named is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        # a part of an axis is written 'axis':(what lies within it)its size
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return all_devices
