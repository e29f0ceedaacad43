"""The roofline's bounds, each against numbers worked out by hand."""

from train.hardware.chips import Chip
from train.hardware.roofline import roofline

CHIP = Chip(flops=100.0, memory=1.0, memory_bandwidth=10.0, link_bandwidth=5.0)


def test_linked_chips() -> None:
    bounds = roofline(CHIP, model_flops=300.0, flops=400.0, moved=10.0, sent=15.0)
    assert bounds == (4.0, 1.0, 3.0, 3 / 4, 3 / 8)


def test_the_slower_of_links_and_network() -> None:
    """Both carry their part at the same time."""
    chip = CHIP._replace(network_bandwidth=0.5)

    def bounds(between_hosts: float) -> tuple[float, float, float]:
        result = roofline(
            chip, model_flops=300.0, flops=400.0, moved=0.0, sent=15.0, between_hosts=between_hosts
        )
        return result.links, result.mfu, result.mfu_in_turn

    assert bounds(0.0) == (3.0, 3 / 4, 3 / 7)
    assert bounds(1.0) == (3.0, 3 / 4, 3 / 7)
    assert bounds(4.0) == (8.0, 3 / 8, 3 / 12)
