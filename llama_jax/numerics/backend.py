"""The platform that a program is compiled for."""

import jax
from jax.sharding import AxisType


def target_platform() -> str:
    """Name the platform, "cpu", "gpu" or "tpu": of the ambient mesh (`jax.set_mesh`) or JAX's default.

    This need not be the platform that compiles. JAX traces anew for a mesh of other devices, so a program
    that was chosen by this is never taken from its caches for another platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_device_kind() -> str:
    """The devices of `target_platform`, as they call themselves: "NVIDIA H100 80GB HBM3", "TPU v5"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind: str = jax.devices()[0].device_kind if device is None else device.device_kind
    return kind


def gpu_capability() -> str | None:
    """CUDA's compute capability of the GPUs that a program is compiled for: "9.0" for Hopper.

    None where it is not known: on another platform, and for GPUs that are not here.
    """
    if target_platform() != "gpu" or jax.default_backend() != "gpu":
        return None
    kind = target_device_kind()
    here = (device for device in jax.devices() if device.device_kind == kind)
    return next((str(device.compute_capability) for device in here), None)


def is_partitioned() -> bool:
    """Whether XLA may split arrays: the ambient mesh has several devices, not counting a `shard_map`'s."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return any(mesh.shape[name] > 1 for name, kind in kinds if kind != AxisType.Manual)
