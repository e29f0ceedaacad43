"""Devices to compile for that nobody here need own: a TPU topology by its name, or parts of the host."""

import importlib.util
import os
from typing import Any

import jax

from llama_jax.formatting import first_line

# libtpu must neither ask a metadata server, nor wait for other hosts, nor want a TPU for itself alone.
# The type says nothing about what is compiled for, which is the topology; it only has to be one.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU topology such as v5p:4x4x4 or v6e:16x16, to compile for, not to run on.

    To be called before JAX has looked for devices: it settles on the CPU, which is what compiles.

    Raises:
        ValueError: libtpu, the compiler for TPUs, is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "topology: found no libtpu, which compiles for TPUs: pip install 'llama-jax[plan]'"
        )
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(topology_name=name, platform="tpu")
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(
            f"topology: found {name!r}, expected one that libtpu knows, such as v5p:4x4x4 or v6e:16x16 "
            f"({first_line(error)})"
        ) from None
    devices: list[Any] = list(described.devices)
    if any(device.core_on_chip for device in devices):
        raise ValueError(
            f"topology: found {name!r}, whose chips are two devices each, expected one device a chip"
        )
    return devices


def host_devices(count: int) -> list[Any]:
    """So many devices of this host's CPU; to be called before JAX has looked for devices.

    Raises:
        ValueError: a number below 1, or JAX has looked for devices already.
    """
    if count < 1:
        raise ValueError(f"host-devices: found {count}, expected at least 1")
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise ValueError(
            f"host-devices: found {count} after JAX has started, expected it before"
        ) from None
    return jax.devices()
