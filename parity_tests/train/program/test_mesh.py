"""The sizes of a mesh's axes."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.train.fake_chips import Chip, chips, gpus
from train.program.mesh import make_mesh, mesh_shape

NAMES = ("stage", "data", "fsdp", "sequence", "tensor")


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ({}, 1, (1, 1, 1, 1, 1)),
        ({"data": -1}, 8, (1, 8, 1, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 1, 2)),
        ({"data": 2, "fsdp": -1, "sequence": 2}, 4, (1, 2, 1, 2, 1)),
        ({"fsdp": 4, "tensor": 2}, 8, (1, 1, 4, 1, 2)),
        ({"stage": 2, "data": -1, "tensor": 2}, 8, (2, 2, 1, 1, 2)),
    ],
)
def test_sizes(sizes: dict[str, int], devices: int, expected: tuple[int, ...]) -> None:
    assert mesh_shape(sizes, devices) == dict(zip(NAMES, expected, strict=True))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(-1, 5), min_size=5, max_size=5), devices=st.integers(1, 24))
def test_sizes_multiply_to_the_devices_or_are_refused(sizes: list[int], devices: int) -> None:
    requested = dict(zip(NAMES, sizes, strict=True))
    try:
        shape = mesh_shape(requested, devices)
    except ValueError as error:
        assert re.fullmatch(r"mesh(\.\w+)?: found .+, expected .+", str(error))
        fixed = [size for size in sizes if size != -1]
        count = math.prod(fixed)
        fits = min(fixed, default=1) > 0 and len(fixed) >= 4 and devices % count == 0
        assert not fits or (len(fixed) == 5 and count != devices)
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


@pytest.mark.parametrize(
    ("lengths", "sizes", "spans"),
    [
        ((4, 4, 4), {"fsdp": 64}, {"fsdp": [4, 4, 4]}),
        ((4, 4, 4), {"fsdp": 16, "tensor": 4}, {"fsdp": [1, 4, 4], "tensor": [1, 1, 4]}),
        ((8, 8, 8), {"fsdp": 128, "tensor": 4}, {"fsdp": [2, 8, 8], "tensor": [1, 1, 4]}),
        ((8, 16, 16), {"fsdp": 256, "sequence": 8}, {"fsdp": [1, 16, 16], "sequence": [1, 1, 8]}),
        # lengths whose factors JAX does not find
        ((4, 4, 28), {"fsdp": 224, "tensor": 2}, {"fsdp": [2, 4, 28], "tensor": [1, 1, 2]}),
        ((4, 4, 28), {"fsdp": 32, "tensor": 14}, {"fsdp": [2, 4, 4], "tensor": [1, 2, 7]}),
        ((4, 4, 20), {"data": 32, "tensor": 10}, {"data": [2, 4, 4], "tensor": [1, 2, 5]}),
    ],
)
def test_a_torus(
    lengths: tuple[int, int, int], sizes: dict[str, int], spans: dict[str, list[int]]
) -> None:
    """Each axis spans a box of the torus: so many chips along its dimensions, in whichever order."""
    mesh = make_mesh(sizes, chips(lengths))
    assert {device.id for device in mesh.devices.flat} == {chip.id for chip in chips(lengths)}
    for axis, span in spans.items():
        along = np.moveaxis(mesh.devices, NAMES.index(axis), -1).reshape(-1, sizes[axis])
        for group in along:
            places = np.array([device.coords for device in group])
            assert sorted(len(set(line)) for line in places.T.tolist()) == span, axis


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 8}, {"fsdp": 16}, {"data": 4, "tensor": 4}, {"stage": 2, "data": 8}],
)
def test_slices(sizes: dict[str, int]) -> None:
    """stage spans the slices, else data, or fsdp without replicas; every other axis stays within one."""
    mesh = make_mesh(sizes, chips((2, 2, 2), slices=2))
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert sorted(chip.id for chip in mesh.devices.flat) == sorted(
        chip.id for chip in chips((2, 2, 2), slices=2)
    )
    outer = next(axis for axis in ("stage", "data", "fsdp") if axis in sizes)
    halves = np.split(slices, 2, axis=NAMES.index(outer))
    assert [set(half.flat) for half in halves] == [{0}, {1}]


@pytest.mark.parametrize(
    ("sizes", "hosts"),
    [
        ({"data": 2, "fsdp": 4}, [[0] * 4, [1] * 4]),
        ({"fsdp": 8}, [[0, 0, 0, 0, 1, 1, 1, 1]]),
        ({"data": 4, "fsdp": 2}, [[0, 0], [0, 0], [1, 1], [1, 1]]),
    ],
)
def test_hosts_of_gpus(sizes: dict[str, int], hosts: list[list[int]]) -> None:
    for devices in (gpus(hosts=2, each=4), gpus(hosts=2, each=4, real=True)):
        mesh = make_mesh(sizes, devices)
        found = np.vectorize(lambda gpu: gpu.id // 4)(mesh.devices)
        assert found.reshape(sizes.get("data", 1), sizes["fsdp"]).tolist() == hosts
        with pytest.raises(ValueError, match=r"divisible by 2 slices \(of GPUs: hosts\)"):
            make_mesh({"fsdp": 1, "tensor": 8}, devices)


def test_a_box_within_a_slice() -> None:
    assert make_mesh({"data": 48}, chips((4, 4, 4))[:48]).devices.size == 48


@pytest.mark.parametrize(
    ("devices", "sizes", "message"),
    [
        (
            chips((4, 4, 4))[:40],
            {"data": 40},
            "mesh: the 40 devices are not a whole slice, expected all of its chips",
        ),
        (
            chips((2, 2, 2), slices=2),
            {"sequence": 8, "tensor": 2},
            "mesh: found data 1 and fsdp 1, expected their product to be divisible by 2 slices "
            "(of GPUs: hosts)",
        ),
        (
            chips((2, 2, 2), slices=2)[:12],
            {"data": 12},
            "mesh: found a slice of 8 devices, expected 6 in each",
        ),
    ],
)
def test_no_layout(devices: list[Chip], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_mesh(sizes, devices)
    assert str(caught.value) == message
