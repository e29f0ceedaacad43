"""Devices you can compile for without having them: TPUs and GPUs by name, or slices of the host's CPU."""

from typing import Any

import jax

from train.hardware.gpu_topology import gpu_devices, parse_gpu_topology
from train.hardware.tpu_topology import parse_tpu_topology, tpu_devices


def topology_devices(name: str) -> list[Any]:
    """Devices to compile for but not to run on, such as the TPUs of v5p:4x4x4 or the GPUs of h100:8.

    Call it before JAX initializes its backends: it selects the CPU, which does the compiling.

    Raises:
        ValueError: as `parse_gpu_topology`, `gpu_devices`, `parse_tpu_topology` and `tpu_devices`.
    """
    gpus = parse_gpu_topology(name)
    return tpu_devices(parse_tpu_topology(name)) if gpus is None else gpu_devices(*gpus)


def host_devices(count: int) -> list[Any]:
    """`count` devices on this host's CPU; call it before JAX initializes its backends.

    Raises:
        ValueError: a count below 1, or JAX has initialized its backends already.
    """
    if count < 1:
        raise ValueError(f"host-devices: found {count}, expected at least 1")
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise ValueError(
            f"host-devices: cannot set {count} devices once JAX has initialized its backends"
        ) from None
    return jax.devices()
