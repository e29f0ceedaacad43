"""Collectives read from HLO, each against numbers worked out by hand."""

import pytest

from train.hardware.collectives import Collective, collectives
from train.hardware.hlo import replica_groups

HLO = """\
HloModule step, is_scheduled=true, num_partitions=8

%condition (arg: (s32[], bf16[4,64])) -> pred[] {
  %arg = (s32[], bf16[4,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  %counter = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%asynchronous (given: bf16[4,64]) -> bf16[4,64] {
  %given = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %exchanged = bf16[4,64]{1,0:T(8,128)(2,1)} all-to-all(%given), replica_groups=[4,2]<=[8]
}

%body (arg: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %arg = (s32[], bf16[4,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,64]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %start = (bf16[4,64]{1,0}, bf16[32,64]{1,0}) all-gather-start(%x), replica_groups={}, dimensions={0}
  %done = bf16[32,64]{1,0} all-gather-done(%start)
  %begun = ((bf16[4,64]{1,0}), bf16[4,64]{1,0}, u32[]{:S(2)}) async-start(%x), calls=%asynchronous
  %ended = bf16[4,64]{1,0} async-done(%begun), calls=%asynchronous
  ROOT %tuple = (s32[], bf16[4,64]{1,0}) tuple(%x, /*index=1*/%ended)
}

ENTRY %main (x: bf16[4,64]) -> f32[8] {
  %x = bf16[4,64]{1,0} parameter(0)
  %tuple = (s32[], bf16[4,64]{1,0}) tuple(%x, %x)
  %loop = (s32[], bf16[4,64]{1,0}) while(%tuple), condition=%condition, body=%body
  %y = f32[64]{0:T(256)} constant(0)
  %s = f32[8]{0} reduce-scatter(%y), replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%add
  %t = f32[8]{0} reduce-scatter(%y), replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}, to_apply=%add
  ROOT %r = f32[8]{0} reduce-scatter(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_collectives_in_every_notation():
    """As for a TPU: loops without a trip count, asynchronous pairs; groups by list, shape and name."""
    by_kind = collectives(HLO)
    assert list(by_kind) == ["all-gather", "reduce-scatter", "all-to-all"]
    gather, scatter, exchange = by_kind.values()
    assert (gather.count, gather.bytes, gather.sent) == (3, 3 * 4096, 3 * 4096 * 7 / 8)
    assert (exchange.count, exchange.bytes, exchange.sent) == (3, 3 * 512, 3 * 512 / 2)
    assert (scatter.count, scatter.bytes) == (3, 3 * 256)
    assert scatter.sent == 256 * (7 / 8 + 1 / 2 + 3 / 4)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("{{0,4},{1,5},{2},{3,6,7}}", [[0, 4], [1, 5], [2], [3, 6, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[1,8]<=[8]", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[4,2]<=[2,2,2]T(2,1,0)", [[0, 4], [2, 6], [1, 5], [3, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        # the outer and the inner half of an axis
        ("mesh['a'=4,'b'=2] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # a mesh of devices in another order
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=([8]) {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=4,'b'=2], device_ids=(7,6,5,4,3,2,1,0) {'b'}", [[7, 6], [5, 4], [3, 2], [1, 0]]),
    ],
)
def test_groups_in_every_notation(text: str, groups: list[list[int]]) -> None:
    attributes = f"%x), channel_id=1, replica_groups={text}, dimensions={{0}}"
    assert replica_groups(attributes, 8) == groups


# two hosts of four devices
HOSTS = [0, 0, 0, 0, 1, 1, 1, 1]
ARRAY = 64 * 32 * 2  # bytes of the operand
WITHIN, ACROSS, APART = "[2,4]<=[8]", "{}", "[4,2]<=[2,4]T(1,0)"


def program(*lines: str) -> str:
    """A program of eight devices that runs `lines`, which may use %x, and a matmul %dot of it."""
    body = "\n".join(f"  {line}" for line in lines)
    return (
        "HloModule step, is_scheduled=true, num_partitions=8\n\n"
        "%wrapped (p: bf16[64,32]) -> bf16[8,32] {\n"
        "  %p = bf16[64,32]{1,0} parameter(0)\n"
        "  ROOT %s = bf16[8,32]{1,0} reduce-scatter(%p), replica_groups={}, to_apply=%add\n"
        "}\n\n"
        "%fused (p: bf16[64,32]) -> bf16[64,64] {\n"
        "  %p = bf16[64,32]{1,0} parameter(0)\n"
        "  ROOT %d = bf16[64,64]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n"
        "}\n\n"
        "ENTRY %main (x: bf16[64,32]) -> bf16[64,32] {\n"
        "  %x = bf16[64,32]{1,0} parameter(0)\n"
        f"{body}\n"
        "}\n"
    )


def only(hlo: str, hosts: list[int] | None = HOSTS) -> Collective:
    (collective,) = collectives(hlo, hosts).values()
    return collective


@pytest.mark.parametrize(
    ("opcode", "groups", "array", "sent", "between_hosts"),
    [
        # of a ring over both hosts a device's network card carries a quarter, as each of four does
        ("all-gather", ACROSS, 8 * ARRAY, 7 * ARRAY, 7 * ARRAY / 4),
        ("all-gather", WITHIN, 4 * ARRAY, 3 * ARRAY, 0),
        ("all-gather", APART, 2 * ARRAY, ARRAY, ARRAY),
        ("all-reduce", ACROSS, ARRAY, 2 * 7 / 8 * ARRAY, 2 * 7 / 8 * ARRAY / 4),
        ("all-reduce", WITHIN, ARRAY, 2 * 3 / 4 * ARRAY, 0),
        ("all-reduce", APART, ARRAY, ARRAY, ARRAY),
        ("reduce-scatter", ACROSS, ARRAY, 7 / 8 * ARRAY, 7 / 8 * ARRAY / 4),
        ("reduce-scatter", WITHIN, ARRAY, 3 / 4 * ARRAY, 0),
        # an eighth for each device, of which four are on the other host
        ("all-to-all", ACROSS, ARRAY, 7 / 8 * ARRAY, 4 / 8 * ARRAY),
        ("all-to-all", APART, ARRAY, ARRAY / 2, ARRAY / 2),
        # only the second group spans hosts
        ("all-reduce", "{{0,1},{3,4},{5,6}}", ARRAY, ARRAY, ARRAY),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_traffic(
    opcode: str, groups: str, array: float, sent: float, between_hosts: float, asynchronous: bool
) -> None:
    attributes = f"replica_groups={groups}, dimensions={{0}}, to_apply=%add"
    lines = [f"%y = bf16[8,32]{{1,0}} {opcode}(%x), {attributes}"]
    if asynchronous:
        pair = "(bf16[64,32]{1,0}, bf16[8,32]{1,0})"
        lines = [
            f"%start = {pair} {opcode}-start(%x), {attributes}",
            "%product = bf16[64,64]{1,0} fusion(%x), kind=kOutput, calls=%fused",
            f"%y = bf16[8,32]{{1,0}} {opcode}-done(%start)",
        ]
    collective = only(program(*lines))
    assert collective.kind == opcode
    assert (collective.count, collective.bytes) == (1, array)
    assert collective.sent == pytest.approx(sent)
    assert collective.between_hosts == pytest.approx(between_hosts)
    assert collective.asynchronous == int(asynchronous)
    assert collective.exposed == (0 if asynchronous else collective.sent)
    assert only(program(*lines), hosts=None).between_hosts == 0


@pytest.mark.parametrize(
    ("pairs", "between_hosts"), [("{0,1},{1,2},{2,3},{3,0}", 0), ("{0,1},{3,4},{7,0}", ARRAY)]
)
def test_permutes(pairs: str, between_hosts: int) -> None:
    line = f"%y = bf16[64,32]{{1,0}} collective-permute(%x), source_target_pairs={{{pairs}}}"
    collective = only(program(line))
    assert (collective.bytes, collective.sent) == (ARRAY, ARRAY)
    assert collective.between_hosts == between_hosts


START = "%start = (bf16[64,32]{1,0}, bf16[512,32]{1,0}) all-gather-start(%x), replica_groups={}"
DONE = "%y = bf16[512,32]{1,0} all-gather-done(%start)"
COPY = "%copy = bf16[64,32]{1,0} copy(%x)"
CUSTOM_CALL = '%call = (bf16[64,32]{1,0}) custom-call(%x), custom_call_target="TARGET"'
WRAPPED = (
    "%start = ((bf16[64,32]{1,0}), bf16[8,32]{1,0}, u32[]) async-start(%x), calls=%wrapped",
    "%y = bf16[8,32]{1,0} async-done(%start), calls=%wrapped",
)


@pytest.mark.parametrize(
    ("lines", "asynchronous", "hidden"),
    [
        ((START, DONE), 0, False),
        ((START, COPY, DONE), 1, False),  # a copy does not hide it
        ((f'{START}, backend_config={{"is_sync":true}}', COPY, DONE), 0, False),
        ((START, "%d = bf16[64,64]{1,0} dot(%x, %x)", DONE), 1, True),
        ((START, "%d = bf16[64,64]{1,0} fusion(%x), kind=kOutput, calls=%fused", DONE), 1, True),
        (("%d = bf16[64,64]{1,0} dot(%x, %x)", START, DONE), 0, False),
        ((START, CUSTOM_CALL.replace("TARGET", "__cublas$lt$matmul"), DONE), 1, True),
        ((START, CUSTOM_CALL.replace("TARGET", "__gpu$xla.gpu.triton"), DONE), 1, True),
        ((START, CUSTOM_CALL.replace("TARGET", "__cudnn$fmhaSoftmax"), DONE), 1, True),
        ((START, CUSTOM_CALL.replace("TARGET", "Sharding"), DONE), 1, False),
        # a matmul's name in another attribute
        ((START, COPY + ', metadata={op_name="mosaic_gpu __cublas"}', DONE), 1, False),
        # what an asynchronous instruction calls
        (WRAPPED, 0, False),
        ((WRAPPED[0], COPY, WRAPPED[1]), 1, False),
        ((WRAPPED[0], "%d = bf16[64,64]{1,0} dot(%x, %x)", WRAPPED[1]), 1, True),
    ],
)
def test_exposed(lines: tuple[str, ...], asynchronous: int, hidden: bool) -> None:
    collective = only(program(*lines))
    assert (collective.count, collective.asynchronous) == (1, asynchronous)
    assert collective.sent > 0
    assert collective.exposed == (0 if hidden else collective.sent)


LOOP = """\
HloModule step, is_scheduled=true, num_partitions=8

%fused_compare (counter: s32[]) -> pred[] {
  %counter = s32[] parameter(0)
  %bound = s32[] constant(7)
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%arg), index=0
  ROOT %less = pred[] CONDITION
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %y = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %tuple = (s32[], f32[8]{0}) tuple(%x, %y)
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %tuple = (s32[], f32[8]{0}) tuple(%x, %x)
  ROOT %loop = (s32[], f32[8]{0}) while(%tuple), condition=%condition, body=%bodyCONFIG
}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'


@pytest.mark.parametrize(
    ("condition", "config", "count"),
    [
        # as XLA leaves it for GPUs, after it has taken one iteration out of the loop
        ("fusion(%counter), kind=kLoop, calls=%fused_compare", "", 7),
        ("fusion(%counter), kind=kLoop, calls=%fused_compare", KNOWN, 5),
        ("compare(%counter, %counter), direction=LT", "", 1),  # unknown
    ],
)
def test_trip_counts(condition: str, config: str, count: int) -> None:
    hlo = LOOP.replace("CONDITION", condition).replace("CONFIG", config)
    assert only(hlo).count == count
