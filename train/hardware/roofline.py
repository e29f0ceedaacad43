"""The least time that a step can take, from what it computes, moves and sends."""

from typing import NamedTuple

from train.hardware.chips import Chip


class Roofline(NamedTuple):
    """Seconds of one step on one device, each as if the others took none; and the MFU they allow.

    compute: the products, at the chip's peak.
    memory: what is there at the peak, written once and read once. A lower bound.
    links: what is sent, over all links of the chip at once. A lower bound: a ring along one dimension of
        a torus has only two of them.
    mfu: model FLOPs over those of the peak where the longest of the three hides the others.
    mfu_in_turn: the same where none hides another.
    """

    compute: float
    memory: float
    links: float
    mfu: float
    mfu_in_turn: float


def roofline(
    chip: Chip, *, model_flops: float, flops: float, moved: float, sent: float
) -> Roofline:
    """Of one device's share of a step.

    Args:
        model_flops: of the model's mathematics, recomputation left out.
        flops: of the products that are done.
        moved: bytes to and from memory.
        sent: bytes to other devices.
    """
    parts = flops / chip.flops, moved / chip.memory_bandwidth, sent / chip.link_bandwidth
    ideal = model_flops / chip.flops
    return Roofline(*parts, ideal / max(parts), ideal / sum(parts))
