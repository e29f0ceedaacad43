"""The sizes of a mesh's axes."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.program.mesh import make_mesh, mesh_shape

NAMES = ("data", "fsdp", "sequence", "tensor")


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({"data": -1}, 8, (8, 1, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({"data": 2, "fsdp": -1, "sequence": 2}, 4, (2, 1, 2, 1)),
        ({"fsdp": 4, "tensor": 2}, 8, (1, 4, 1, 2)),
    ],
)
def test_sizes(sizes: dict[str, int], devices: int, expected: tuple[int, ...]) -> None:
    assert mesh_shape(sizes, devices) == dict(zip(NAMES, expected, strict=True))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(-1, 5), min_size=4, max_size=4), devices=st.integers(1, 24))
def test_sizes_multiply_to_the_devices_or_are_refused(sizes: list[int], devices: int) -> None:
    requested = dict(zip(NAMES, sizes, strict=True))
    try:
        shape = mesh_shape(requested, devices)
    except ValueError as error:
        assert re.fullmatch(r"mesh(\.\w+)?: found .+, expected .+", str(error))
        fixed = [size for size in sizes if size != -1]
        count = math.prod(fixed)
        fits = min(fixed, default=1) > 0 and len(fixed) >= 3 and devices % count == 0
        assert not fits or (len(fixed) == 4 and count != devices)
        return
    for name, size in shape.items():
        assert requested[name] in (size, -1)
    assert math.prod(shape.values()) == devices


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 3},
            "mesh: found data 3 x fsdp 1 x sequence 1 x tensor 1 = 3, expected 8, the number of devices",
        ),
        (
            {"data": -1, "tensor": 3},
            "mesh: found fsdp 1 x sequence 1 x tensor 3 = 3, expected a divisor of 8 devices",
        ),
        ({"data": -1, "fsdp": -1}, "mesh: found -1 for data and fsdp, expected it once"),
        (
            {"tensor": 0},
            "mesh.tensor: found 0, expected at least 1, or -1 for the remaining devices",
        ),
        (
            {"tensor": -2},
            "mesh.tensor: found -2, expected at least 1, or -1 for the remaining devices",
        ),
    ],
)
def test_wrong_sizes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        mesh_shape(sizes, 8)
    assert str(caught.value) == message


def test_the_mesh_of_one_device() -> None:
    assert dict(make_mesh({"data": -1}).shape) == dict.fromkeys(NAMES, 1)
