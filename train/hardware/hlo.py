"""XLA's HLO as text: its instructions, how often each runs, and the groups of its collectives."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Instruction(NamedTuple):
    """`name = type opcode(operands), attributes`; rest is what follows the first parenthesis."""

    name: str
    type: str
    opcode: str
    rest: str


class Computation(NamedTuple):
    """A function of the program; its instructions are in the order in which they are scheduled."""

    name: str
    entry: bool
    instructions: list[Instruction]


class Execution(NamedTuple):
    """An instruction that runs `times` times, in its place in the schedule.

    scheduled, at: where the instruction stands or, if it is what a fusion or an asynchronous instruction
        runs, where that one does.
    """

    computation: Computation
    instruction: Instruction
    times: int
    scheduled: Computation
    at: Instruction


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*-> .*\{$")
# the type of an asynchronous operation is a tuple of tuples
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def parse(text: str) -> dict[str, Computation]:
    """The computations of a program, `compiled.as_text()`, by name."""
    program: dict[str, Computation] = {}
    instructions: list[Instruction] = []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head is not None:
            instructions = []
            program[head[2]] = Computation(head[2], head[1] is not None, instructions)
            continue
        match = _INSTRUCTION.match(line)
        if match is not None:
            instructions.append(Instruction(*match.groups()))
    return program


def operands(instruction: Instruction) -> list[str]:
    """The names between its parentheses, which hold no others where a collective's are."""
    inside, _, _ = instruction.rest.partition(")")
    return re.findall(r"%([\w.-]+)", inside)


def executed(program: dict[str, Computation]) -> Iterator[Execution]:
    """Every instruction that runs.

    A loop's trip count is the one that the compiler found, or the bound that its counter is compared
    with; a loop with neither counts once.
    """

    def visit(
        name: str, times: int, start: tuple[Computation, Instruction] | None
    ) -> Iterator[Execution]:
        computation = program[name]
        for instruction in computation.instructions:
            place = start or (computation, instruction)
            yield Execution(computation, instruction, times, *place)
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # its -start has been counted
            repeats = _trip_count(program, instruction) if instruction.opcode == "while" else 1
            opaque = instruction.opcode == "fusion" or instruction.opcode.endswith("-start")
            inner = place if opaque else start
            for called in called_by(instruction):
                if called in program:
                    yield from visit(called, times * repeats, inner)

    for computation in program.values():
        if computation.entry:
            yield from visit(computation.name, 1, None)


def called_by(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction runs."""
    called = _CALLED.findall(instruction.rest)
    for names in _BRANCHES.findall(instruction.rest):
        called += re.findall(r"%?([\w.-]+)", names)
    return called


def _trip_count(program: dict[str, Computation], loop: Instruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known is not None:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    assert condition is not None
    # a scan's counter goes from 0 to the only constant in its condition, which may be fused
    bounds = list(_constants(program, condition[1]))
    return bounds[0] if len(bounds) == 1 else 1


def _constants(program: dict[str, Computation], name: str) -> Iterator[int]:
    """The whole numbers in a computation and in those that it calls."""
    for instruction in program[name].instructions:
        value = re.match(r"(\d+)\)", instruction.rest)
        if instruction.opcode == "constant" and value is not None:
            yield int(value[1])
        for called in called_by(instruction):
            if called in program:
                yield from _constants(program, called)


# bits of an element; "token" and the like have none
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}


def array_bytes(type_text: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    total = 0
    for name, shape in _ARRAY.findall(type_text):
        digits = re.match(r"[suf](\d+)", name)
        bits = _BITS.get(name, int(digits[1]) if digits else 0)
        total += math.prod(int(size) for size in shape.split(",") if size) * bits // 8
    return total


def replica_groups(text: str, devices: int) -> list[list[int]]:
    """The groups of devices that take part in a collective, whose attributes are `text`.

    They are listed, as {{0,1},{2,3}}; or the rows of an array, as [2,2]<=[2,2]T(1,0); or axes of a mesh,
    as mesh['a'=2,'b'=2] {'b'}. Without any, all of the `devices` of the program are one group.
    """
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if listed is not None:
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    rows = re.search(r"replica_groups=\[\d+,(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if rows is not None:
        groups: list[list[int]] = _transposed_range(rows[2]).reshape(-1, int(rows[1])).tolist()
        return groups
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}", text
    )
    if mesh is not None:
        return _mesh_groups(*mesh.groups())
    return [list(range(devices))]


def _mesh_groups(mesh: str, devices: str | None, grouped: str) -> list[list[int]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    # a part of an axis is written 'axis':(the product of the parts before it)its size
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped):
        first = int(before or 1)
        spans[name].append((first, first * int(size or sizes[name])))
    shape, inside = [], []
    for name, size in sizes.items():
        cuts = sorted({1, size, *itertools.chain(*spans[name])})
        for low, high in itertools.pairwise(cuts):
            shape.append(high // low)
            inside.append(any(first <= low and high <= last for first, last in spans[name]))
    order = np.argsort(inside, kind="stable")
    group = math.prod(size for size, is_inside in zip(shape, inside, strict=True) if is_inside)
    if devices is None:
        numbers = np.arange(math.prod(shape))
    elif devices.startswith("["):
        numbers = _transposed_range(devices)
    else:
        numbers = np.array(_numbers(devices))
    groups: list[list[int]] = numbers.reshape(shape).transpose(order).reshape(-1, group).tolist()
    return groups


def _transposed_range(text: str) -> Int[np.ndarray, " devices"]:
    """The numbers that "[2,4]T(1,0)" stands for: 0 to 7 as an array of that shape, its axes reordered."""
    shape, _, order = text.partition("T")
    sizes = _numbers(shape)
    axes = _numbers(order) or range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
