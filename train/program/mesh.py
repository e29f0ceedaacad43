"""The device mesh of a run: axes data, fsdp, sequence, tensor, any product of them, several slices too."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.sharding import MESH_AXES


def mesh_shape(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """The sizes of all axes, with the one that is -1 filled in so that they multiply to the devices.

    Raises:
        ValueError: two axes of -1, a size below 1, or sizes that do not multiply to `device_count`.
    """
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    rest = [axis for axis, size in shape.items() if size == -1]
    for axis, size in shape.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis}: found {size}, expected at least 1, or -1 for the rest")
    if len(rest) > 1:
        raise ValueError(f"mesh: found -1 for {' and '.join(rest)}, expected it once")
    known = math.prod(size for size in shape.values() if size != -1)
    shown = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size != -1)
    if rest:
        if device_count % known:
            raise ValueError(
                f"mesh: found {shown} = {known}, expected to divide {device_count} devices"
            )
        shape[rest[0]] = device_count // known
    elif known != device_count:
        raise ValueError(f"mesh: found {shown} = {known}, expected {device_count} devices in all")
    return shape


def in_words(sizes: Mapping[str, int]) -> str:
    """A mesh's axes and their sizes, those of size 1 left out."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of every process), laid out for the hardware's links.

    Across TPU slices (or GPU hosts that say so), whose links are slow, the data axis is split first, then
    fsdp; the others stay within a slice. Axis types are Auto: the compiler places what nobody constrains.

    Raises:
        ValueError: what `mesh_shape` refuses, or slices that neither data nor fsdp divides over.
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
    """How many slices each axis spans: data as many as it can, fsdp the rest, the others none.

    Raises:
        ValueError: data and fsdp together do not divide over the slices.
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
