"""Devices you can compile for without having them: TPUs and GPUs by name, or slices of the host's CPU."""

import importlib.util
import os
from typing import Any

import jax

from llama_jax.formatting import first_line
from train.hardware.gpu_topology import gpu_devices, parse_gpu_topology

# Without these libtpu asks a metadata server, waits for other hosts and locks a TPU for itself. The
# accelerator type must be valid, but it is the topology that is compiled for.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def topology_devices(name: str) -> list[Any]:
    """Devices to compile for but not to run on, such as the TPUs of v5p:4x4x4 or the GPUs of h100:8.

    Call it before JAX initializes its backends: it selects the CPU, which does the compiling.

    Raises:
        ValueError: libtpu, the compiler for TPUs, is not installed, or does not know the topology; as
            `gpu_devices`.
    """
    gpus = parse_gpu_topology(name)
    if gpus is not None:
        return gpu_devices(*gpus)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "--topology: libtpu is not installed; in the checkout: pip install '.[plan]'"
        )
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(topology_name=name, platform="tpu")
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(
            f"topology: found {name!r}, expected a topology such as v5p:4x4x4, v6e:16x16 or h100:8 "
            f"({first_line(error)})"
        ) from None
    devices: list[Any] = list(topology.devices)
    if any(device.core_on_chip for device in devices):
        raise ValueError(
            f"topology: found {name!r}, whose chips are two devices each; expected one device per chip"
        )
    return devices


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
