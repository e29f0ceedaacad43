"""Bytes and seconds by mesh axis and link, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from llama_jax.sharding import MESH_AXES
from parity_tests.train.fake_chips import Chip, chips
from train.hardware.links import hosts_of, traffic
from train.hardware.transfers import Transfer
from train.program.mesh import make_mesh

GB = 1e9
V5P = 600e9  # bytes/s of six links


def transfer(kind: str, groups: Sequence[Sequence[int]], **changes: bool) -> Transfer:
    """One that sends 1 GB."""
    flags = {"between_slices": False, "asynchronous": False, "hidden": False} | changes
    return Transfer(kind, 1, int(GB), GB, groups, **flags)


def groups_along(mesh: Mesh, axis: str) -> list[list[int]]:
    numbers = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    size = mesh.shape[axis]
    groups: list[list[int]] = (
        np.moveaxis(numbers, MESH_AXES.index(axis), -1).reshape(-1, size).tolist()
    )
    return groups  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "sizes", "axis", "dimensions", "links"),
    [
        ((4, 4, 4), {"fsdp": 64}, "fsdp", 3, 6),
        ((4, 4, 4), {"fsdp": 16, "tensor": 4}, "fsdp", 2, 4),
        ((4, 4, 4), {"fsdp": 16, "tensor": 4}, "tensor", 1, 2),
        ((2, 2, 4), {"fsdp": 4, "tensor": 4}, "tensor", None, None),  # no wraparound: lines
        ((8, 8, 8), {"fsdp": 128, "tensor": 4}, "tensor", 1, 1),  # half of a ring
        (
            (8, 8, 8),
            {"fsdp": 128, "tensor": 4},
            "fsdp",
            3,
            5,
        ),  # two rings, and two chips of the third
    ],
)
def test_dimensions_of_a_torus(
    lengths: tuple[int, int, int],
    sizes: dict[str, int],
    axis: str,
    dimensions: int | None,
    links: int | None,
) -> None:
    mesh = make_mesh(sizes, chips(lengths))
    (row,) = traffic([transfer("all-gather", groups_along(mesh, axis))], mesh)
    assert row.axes == (axis,)
    names = row.links.split()
    assert names[0] == "ICI"
    if dimensions is None or links is None:
        links = dimensions = len(names) - 1  # one link along each
    assert len(names) == 1 + dimensions
    assert (row.sent, row.exposed) == (GB, GB)
    assert row.seconds == row.exposed_seconds == pytest.approx(GB / (V5P / 6 * links))


def test_permutes_over_a_ring_and_over_all_axes() -> None:
    mesh = make_mesh({"fsdp": 16, "tensor": 4}, chips((4, 4, 4)))
    rings = groups_along(mesh, "tensor")
    pairs = [[ring[place], ring[(place + 1) % 4]] for ring in rings for place in range(4)]
    whole = [list(range(64))]
    found = [
        transfer("collective-permute", pairs, asynchronous=True, hidden=True),
        transfer("collective-permute", pairs, asynchronous=True),
        transfer("all-reduce", whole),
    ]
    over_tensor, over_all = traffic(found, mesh)
    assert (over_tensor.axes, over_tensor.sent, over_tensor.exposed) == (("tensor",), 2 * GB, GB)
    assert over_tensor.seconds == pytest.approx(2 * GB / 200e9)
    assert over_tensor.exposed_seconds == pytest.approx(GB / 200e9)
    assert (over_all.axes, over_all.links) == (("fsdp", "tensor"), "ICI x y z")


def test_between_slices() -> None:
    """The program is one slice's; its 8 devices are the first half of the mesh."""
    mesh = make_mesh({"data": 2, "fsdp": 8}, chips((2, 2, 2), slices=2))
    found = [
        transfer("all-reduce", (), between_slices=True),
        transfer("all-gather", [list(range(8))]),
    ]
    rows = {row.links: row for row in traffic(found, mesh)}
    assert rows["DCN"].axes == ("data",)
    assert rows["DCN"].seconds == pytest.approx(GB / 6.25e9)  # 50 Gb/s a chip
    assert rows["ICI x y z"].axes == ("fsdp",)
    assert rows["ICI x y z"].seconds == pytest.approx(GB / 300e9)  # three links: no wraparound


def test_hosts_of_gpus() -> None:
    """Of a ring through two hosts of four, a network card carries one of four parts."""
    kind = "NVIDIA H100 80GB HBM3"
    gpus = [
        Chip((host, gpu, 0), device_kind=kind, platform="gpu", process_index=host)
        for host in range(2)
        for gpu in range(4)
    ]
    assert hosts_of(gpus) == [0] * 4 + [1] * 4
    mesh = Mesh(np.array(gpus, object).reshape(1, 2, 4, 1, 1), MESH_AXES)
    found = [
        transfer("all-gather", groups_along(mesh, "fsdp")),
        transfer("all-reduce", [list(range(8))]),
    ]
    rows = {(row.axes, row.links): row for row in traffic(found, mesh)}
    assert rows[("fsdp",), "NVLink"].seconds == pytest.approx(GB / 450e9)
    both = ("data", "fsdp")
    assert rows[both, "network"].sent == GB / 4
    assert rows[both, "network"].seconds == pytest.approx(GB / 4 / 50e9)
    assert rows[both, "NVLink"].sent == GB * 3 / 4
    assert len(rows) == 3


def test_devices_without_a_data_sheet() -> None:
    mesh = jax.make_mesh((1,) * 5, MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    assert hosts_of(jax.devices()) is None
    (row,) = traffic([transfer("all-reduce", [[0]])], mesh)
    assert (row.axes, row.links, row.sent) == ((), "", GB)
    assert math.isnan(row.seconds)
