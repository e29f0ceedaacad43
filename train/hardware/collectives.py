"""The collectives of a compiled program by kind, read from its text (XLA's HLO)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from train.hardware.transfers import KINDS, Transfer, transfers


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program, seen from one device.

    count: how many run, those in a loop once per iteration.
    bytes, sent: as of a `Transfer`.
    between_hosts: of what is sent, what goes over the network by the device that sends most: of a ring
        through hosts with m devices each, one part in m, as each device's network card carries one of m
        rings; of an exchange, the parts for devices of other hosts. All of what goes between TPU slices.
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
    return by_kind(transfers(hlo), hosts)


def by_kind(found: Iterable[Transfer], hosts: Sequence[int] | None = None) -> dict[str, Collective]:
    """Transfers, summed by kind; `hosts` as of `collectives`."""
    totals: dict[str, Collective] = {}
    for transfer in found:
        before = totals.get(transfer.kind, Collective(transfer.kind, 0, 0, 0.0))
        totals[transfer.kind] = Collective(
            transfer.kind,
            before.count + transfer.times,
            before.bytes + transfer.bytes,
            before.sent + transfer.sent,
            before.between_hosts + transfer.sent * network_share(transfer, hosts),
            before.asynchronous + transfer.times * transfer.asynchronous,
            before.exposed + (0.0 if transfer.hidden else transfer.sent),
        )
    return {kind: totals[kind] for kind in KINDS if kind in totals}


def network_share(transfer: Transfer, hosts: Sequence[int] | None) -> float:
    """Of what a device sends, the part that goes to other hosts, in the group where it is largest."""
    if transfer.between_slices:
        return 1.0
    if hosts is None:
        return 0.0

    def share(group: Sequence[int]) -> float:
        spanned = [hosts[device] for device in group]
        fewest = min(map(spanned.count, set(spanned)))
        if fewest == len(group):
            return 0.0
        if transfer.kind == "all-to-all":
            return (len(group) - fewest) / (len(group) - 1)
        return 1 / fewest

    return max(map(share, transfer.groups))
