"""Collectives as TPUs write them, each against numbers worked out by hand: in fusions, between slices."""

from __future__ import annotations

import pytest

from train.hardware.collectives import by_kind
from train.hardware.transfers import Transfer, transfers

ARRAY = 64 * 32 * 2  # bytes of bf16[64,32]

FUSED = """\
HloModule step, is_scheduled=true, num_partitions=8

%fused_start (p: bf16[8,32]) -> (bf16[8,32], bf16[64,32], u32[]) {
  %p = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %begun = (bf16[8,32]{1,0}, bf16[64,32]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: bf16[8,32], q: bf16[64,32]) -> (bf16[64,64], bf16[64,32]) {
  %p = bf16[8,32]{1,0} parameter(0)
  %q = bf16[64,32]{1,0} parameter(1)
  %convolution.1 = f32[64,64]{1,0} convolution(%q, %q), dim_labels=bf_oi->bf
  %all-gather.2 = bf16[64,32]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %both = (f32[64,64]{1,0}, bf16[64,32]{1,0}) tuple(%convolution.1, %all-gather.2)
}

%fused_done (p: bf16[8,32], q: bf16[64,32]) -> bf16[64,32] {
  %p = bf16[8,32]{1,0} parameter(0)
  %q = bf16[64,32]{1,0} parameter(1)
  %all-gather.3 = bf16[64,32]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %ended = bf16[64,32]{1,0} custom-call(%p, %q, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p: bf16[64,32]) -> bf16[16,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0} all-reduce(%p), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part = bf16[16,32]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={16,32}
}

ENTRY %main (x: bf16[8,32], y: bf16[64,32]) -> bf16[64,32] {
  %x = bf16[8,32]{1,0} parameter(0)
  %y = bf16[64,32]{1,0} parameter(1)
BODY
}
"""  # noqa: E501

BEGIN = "%s = (bf16[8,32]{1,0}, bf16[64,32]{1,0}, u32[]) fusion(%x), calls=%fused_start"
MATMUL = "%m = (f32[64,64]{1,0}, bf16[64,32]{1,0}) fusion(%x, %y), calls=%async_collective_fusion.1"
COPY = "%copy = bf16[64,32]{1,0} copy(%y)"
END = "%e = bf16[64,32]{1,0} fusion(%x, %y), calls=%fused_done"
SCATTER = "%f = bf16[16,32]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1"
REDUCE = "%r = bf16[64,32]{1,0} all-reduce(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add"


def program(*lines: str) -> str:
    return FUSED.replace("BODY", "\n".join(f"  {line}" for line in lines))


@pytest.mark.parametrize(
    ("lines", "asynchronous", "hidden"),
    [
        ((BEGIN, MATMUL, END), True, True),
        ((BEGIN, COPY, END), True, False),
        ((BEGIN, MATMUL, MATMUL, END), True, True),
        ((MATMUL,), False, False),  # not started before: the fusion itself waits for it
    ],
)
def test_a_gather_in_several_fusions_is_one(
    lines: tuple[str, ...], asynchronous: bool, hidden: bool
) -> None:
    (gather,) = transfers(program(*lines))
    assert (gather.kind, gather.times, gather.bytes) == ("all-gather", 1, ARRAY)
    assert gather.sent == ARRAY * 7 / 8
    assert (gather.asynchronous, gather.hidden) == (asynchronous, hidden)


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter() -> None:
    """3/4 of the array among four; an all-reduce that stands by itself sends twice that."""
    kinds = by_kind(transfers(program(SCATTER, REDUCE)))
    assert kinds["reduce-scatter"].sent == ARRAY * 3 / 4
    assert kinds["all-reduce"].sent == ARRAY * 2 * 3 / 4
    assert [(kind.count, kind.bytes) for kind in kinds.values()] == [(1, ARRAY)] * 2


def between_slices(kind: str, sent: str, received: str, slices: int | None, *lines: str) -> str:
    """A program of one of several slices that gives `sent` to its hosts and gets `received` back."""
    target = (
        "" if slices is None else f'_xla_megascale_target="{{{",".join("1" * slices)}}}x{{0:3}}",'
    )
    attributes = (
        "is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_host_transfer_rendezvous="{kind}_0",{target}_xla_megascale_transfer_type="{kind}"}}'
    )
    return program(
        f"%a = bf16[{sent}]{{1,0}} copy(%y)",
        "%token = token[] after-all()",
        f"%send = (bf16[{sent}]{{1,0}}, u32[], token[]) send(%a, %token), channel_id=2, {attributes}",
        f"%recv = (bf16[{received}]{{1,0}}, u32[], token[]) recv(%token), channel_id=1, {attributes}",
        f"%sent = token[] send-done(%send), channel_id=2, {attributes}",
        *lines,
        f"%got = (bf16[{received}]{{1,0}}, token[]) recv-done(%recv), channel_id=1, {attributes}",
    )


@pytest.mark.parametrize(
    ("kind", "sent", "received", "slices", "share"),
    [
        ("ALL_REDUCE", "64,32", "64,32", 2, 1.0),
        ("ALL_REDUCE", "64,32", "64,32", 4, 2 * 3 / 4),
        ("ALL_REDUCE", "64,32", "64,32", None, 1.0),  # of some slices: at least two
        ("ALL_GATHER", "16,32", "64,32", None, 3 / 4),
        ("REDUCE_SCATTER", "64,32", "16,32", None, 3 / 4),
        ("ALL_TO_ALL", "64,32", "64,32", 4, 3 / 4),
        ("ONE_TO_ONE", "64,32", "64,32", None, 1.0),
    ],
)
def test_between_slices(
    kind: str, sent: str, received: str, slices: int | None, share: float
) -> None:
    """All of it goes over the network; the chips of a slice are all that the program knows."""
    (found,) = transfers(between_slices(kind, sent, received, slices))
    expected = "collective-permute" if kind == "ONE_TO_ONE" else kind.lower().replace("_", "-")
    assert (found.kind, found.bytes, found.sent) == (expected, ARRAY, ARRAY * share)
    assert (found.asynchronous, found.hidden) == (True, False)
    (total,) = by_kind([found]).values()
    assert total.between_hosts == total.sent == total.exposed


def test_a_matmul_hides_what_goes_between_slices() -> None:
    dot = "%d = bf16[64,64]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    found: list[Transfer] = list(
        transfers(between_slices("ALL_REDUCE", "64,32", "64,32", 2, dot, REDUCE))
    )
    assert [transfer.hidden for transfer in found] == [True, False]
    assert [transfer.between_slices for transfer in found] == [True, False]
