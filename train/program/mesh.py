"""The device mesh of a run: axes stage, data, fsdp, sequence and tensor, within a slice or over several."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.sharding import BATCH_AXES, MESH_AXES


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
    shown = " x ".join(
        f"{axis} {size}"
        for axis, size in shape.items()
        if size != -1 and (axis, size) != ("stage", 1)
    )
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


def divisors(number: int) -> list[int]:
    """All of them, in order.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [n for n in range(1, number + 1) if number % n == 0]


def in_words(sizes: Mapping[str, int]) -> str:
    """A mesh's axes with their sizes, without those of size 1."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all devices of all processes), laid out for the hardware's links.

    Links between TPU slices, or between GPU hosts, are slow, so the stage axis is the first to span them,
    then data and fsdp; the other axes stay within one. Axis types are Auto: the compiler shards what is not
    constrained.

    A dimension of the torus may be split over several axes, each of which then has a part of its links.

    Raises:
        ValueError: as `mesh_shape` and `shape_over_slices`; devices that are no whole slices, or slices
            of different sizes.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(_slice_of(device), []).append(device)
    outer = shape_over_slices(shape, len(slices))
    inner = tuple(shape[axis] // outer[axis] for axis in MESH_AXES)
    grids = np.array([_slice_grid(inner, slices[index]) for index in sorted(slices)])
    # [slices, *inner] -> every axis over slices first, then within one
    axes = len(MESH_AXES)
    order = [place for axis in range(axes) for place in (axis, axes + axis)]
    grid = grids.reshape(*outer.values(), *inner).transpose(order).reshape(*shape.values())
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * axes)


def count_slices(devices: Sequence[Any]) -> int:
    """How many slices of TPUs, or hosts of GPUs, the devices are of."""
    return len({_slice_of(device) for device in devices})


def _slice_of(device: Any) -> int:
    """Where devices are linked to each other: a slice of TPUs, a host of GPUs."""
    if device.platform == "gpu" and device.client.runtime_type == "compile_only_runtime":
        # JAX gives the GPUs of each host a slice of their own, but not to GPUs of a described topology
        return int(device.process_index)
    return getattr(device, "slice_index", 0)


def _slice_grid(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray[Any, Any]:
    """The devices of one slice as a mesh of `shape`, which may split a dimension of its torus over axes."""
    if len(devices) != math.prod(shape):
        raise ValueError(
            f"mesh: found a slice of {len(devices)} devices, expected {math.prod(shape)} in each"
        )
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, TypeError, ValueError):
        # JAX takes the prime factors of lengths such as 20 and 28 to be 5 and 7 alone
        return _split_torus(shape, devices)
    except AssertionError:
        raise ValueError(
            f"mesh: the {len(devices)} devices are not a whole slice, expected all of its chips"
        ) from None


def _split_torus(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray[Any, Any]:
    """A mesh of any shape: the last axis takes what it can of each dimension, then the one before it."""
    coordinates = np.array([device.coords for device in devices])
    remaining = np.ptp(coordinates, axis=0) + 1
    parts = np.ones((len(remaining), len(shape)), int)
    for axis in reversed(range(len(shape))):
        size = shape[axis]
        for dimension, length in enumerate(remaining):
            part = math.gcd(size, length)
            parts[dimension, axis] = part
            size //= part
            remaining[dimension] //= part
    by_place = np.array(devices, object)[np.lexsort(coordinates.T[::-1])]
    grid = by_place.reshape(parts.reshape(-1))  # [dimension 0's parts by axis, dimension 1's, ...]
    by_axis = np.arange(parts.size).reshape(parts.shape).T.reshape(-1)
    return grid.transpose(by_axis).reshape(shape)


def shape_over_slices(shape: Mapping[str, int], slices: int) -> dict[str, int]:
    """Over how many slices each axis spans: stage as many as it can, then data, then fsdp, the others one.

    Raises:
        ValueError: stage times data times fsdp is not a multiple of the slices.
    """
    spans = _parts_over_slices(shape, slices)
    if math.prod(spans.values()) != slices:
        stages = "" if shape["stage"] == 1 else f"stage {shape['stage']}, "
        raise ValueError(
            f"mesh: found {stages}data {shape['data']} and fsdp {shape['fsdp']}, expected their product to "
            f"be divisible by {slices} slices (of GPUs: hosts)"
        )
    return dict.fromkeys(shape, 1) | spans


def spans_slices(shape: Mapping[str, int], slices: int) -> bool:
    """Whether stage, data and fsdp together can be laid over `slices`, as `shape_over_slices` does."""
    return math.prod(_parts_over_slices(shape, slices).values()) == slices


def _parts_over_slices(shape: Mapping[str, int], slices: int) -> dict[str, int]:
    spans = {}
    for axis in BATCH_AXES:
        spans[axis] = math.gcd(shape[axis], slices)
        slices //= spans[axis]
    return spans
