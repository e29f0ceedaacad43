"""The device mesh of a run: axes data, fsdp, sequence and tensor, within a slice or over several."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.sharding import MESH_AXES


def mesh_shape(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """The sizes of all axes; one that is -1 is set so that they multiply to the number of devices.

    Raises:
        ValueError: two axes of -1, a size below 1, or sizes that do not multiply to `device_count`.
    """
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    unset = [axis for axis, size in shape.items() if size == -1]
    for axis, size in shape.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"mesh.{axis}: found {size}, expected at least 1, or -1 for the remaining devices"
            )
    if len(unset) > 1:
        raise ValueError(f"mesh: found -1 for {' and '.join(unset)}, expected it once")
    known = math.prod(size for size in shape.values() if size != -1)
    shown = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size != -1)
    if unset:
        if device_count % known:
            raise ValueError(
                f"mesh: found {shown} = {known}, expected a divisor of {device_count} devices"
            )
        shape[unset[0]] = device_count // known
    elif known != device_count:
        raise ValueError(
            f"mesh: found {shown} = {known}, expected {device_count}, the number of devices"
        )
    return shape


def in_words(sizes: Mapping[str, int]) -> str:
    """A mesh's axes with their sizes, without those of size 1."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all devices of all processes), laid out for the hardware's links.

    Links between TPU slices (or GPU hosts that report a slice) are slow, so the data axis is the first to
    span slices, then fsdp; the other axes stay within a slice. Axis types are Auto: the compiler shards
    what is not constrained.

    Raises:
        ValueError: as `mesh_shape` and `shape_over_slices`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    types = (AxisType.Auto,) * len(MESH_AXES)
    if slices == 1:
        return jax.make_mesh(
            tuple(shape.values()), MESH_AXES, axis_types=types, devices=list(devices)
        )
    outer = shape_over_slices(shape, slices)
    inner = [shape[axis] // outer[axis] for axis in MESH_AXES]
    grid = mesh_utils.create_hybrid_device_mesh(inner, tuple(outer.values()), devices=devices)
    return Mesh(grid, MESH_AXES, axis_types=types)


def shape_over_slices(shape: Mapping[str, int], slices: int) -> dict[str, int]:
    """Over how many slices each axis spans: data as many as it can, fsdp the rest, the others one.

    Raises:
        ValueError: data times fsdp is not a multiple of the slices.
    """
    outer = dict.fromkeys(shape, 1)
    outer["data"] = math.gcd(shape["data"], slices)
    outer["fsdp"] = math.gcd(shape["fsdp"], slices // outer["data"])
    if outer["data"] * outer["fsdp"] != slices:
        raise ValueError(
            f"mesh: found data {shape['data']} and fsdp {shape['fsdp']}, expected their product to be "
            f"divisible by {slices} slices"
        )
    return outer
