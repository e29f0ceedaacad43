"""Lower bounds of a step's time, from what it computes, moves and sends (the roofline model)."""

from typing import NamedTuple

from train.hardware.chips import Chip


class Roofline(NamedTuple):
    """Seconds of one step on one device for each resource alone, and the MFU they allow.

    compute: the matmuls, at the chip's peak.
    memory: the peak memory, read once and written once.
    links: what is sent, over all of the chip's links in parallel, or what of it goes between hosts, over
        the network: the longer of the two. A ring along one dimension of a torus has only two links.
    mfu: if the longest of the three hides the others.
    mfu_in_turn: if none hides another.
    """

    compute: float
    memory: float
    links: float
    mfu: float
    mfu_in_turn: float


def roofline(
    chip: Chip,
    *,
    model_flops: float,
    flops: float,
    moved: float,
    sent: float,
    between_hosts: float = 0.0,
) -> Roofline:
    """The bounds for one device's share of a step.

    Args:
        model_flops: of the model, without recomputation.
        flops: of the matmuls that run.
        moved: bytes to and from memory.
        sent: bytes to other devices. between_hosts: of these, bytes over the network.
    """
    links = sent / chip.link_bandwidth
    if chip.network_bandwidth is not None:
        links = max(links, between_hosts / chip.network_bandwidth)
    seconds = flops / chip.flops, moved / chip.memory_bandwidth, links
    ideal = model_flops / chip.flops
    return Roofline(*seconds, ideal / max(seconds), ideal / sum(seconds))
