"""NVIDIA GPUs you can compile for without having them, and what XLA is told of them."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from llama_jax.formatting import first_line
from train.hardware.gpu_compiler import use_gpu_compiler
from train.hardware.gpus import GPUS, GpuModel

CUDA_RUNTIME, CUDNN = (12, 8), (9, 10)


def parse_gpu_topology(text: str) -> tuple[GpuModel, int, int] | None:
    """The GPU, the number of hosts and the GPUs of each, of "h100:8" or "h100:64x8"; None for TPUs.

    Raises:
        ValueError: a GPU that is not in `GPUS`, no such form, or none of them.
    """
    name, _, shape = text.lower().partition(":")
    if re.match(r"(\d+x)?(v\d|tpu)", name):
        return None
    if name not in GPUS:
        raise ValueError(
            f"topology: found {text!r}, expected TPUs, such as v5p:4x4x4, or GPUs, such as h100:8 or "
            f"h100:64x8, of {', '.join(GPUS)}"
        )
    counts = re.fullmatch(r"(?:(\d+)x)?(\d+)", shape)
    hosts, gpus = (int(counts[1] or 1), int(counts[2])) if counts else (0, 0)
    if hosts * gpus < 1:
        raise ValueError(
            f"topology: found {text!r}, expected a number of GPUs, such as {name}:8, or of hosts and the "
            f"GPUs of each, such as {name}:64x8"
        )
    return GPUS[name], hosts, gpus


def gpu_devices(gpu: GpuModel, hosts: int, gpus_per_host: int) -> list[Any]:
    """Devices to compile for, not to run on, of one NVLink domain a host.

    To be called before JAX has looked for devices: it settles on the CPU, which is what compiles.

    Raises:
        ValueError: as `use_gpu_compiler`; XLA refuses the topology.
    """
    use_gpu_compiler()
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        with _without_stderr():  # says that there is no driver
            topology = topologies.get_topology_desc(
                platform="cuda",
                topology_name=gpu.name,
                topology=f"1x{hosts}x{gpus_per_host}",
                target_config=target_config(gpu),
            )
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"topology: XLA refuses {hosts} x {gpus_per_host} x {gpu.name} ({first_line(error)})"
        ) from None
    return list(topology.devices)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what C++ prints before its log is set up."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def target_config(gpu: GpuModel) -> str:
    """XLA's GpuTargetConfigProto of a GPU, as text."""
    major, minor = gpu.capability
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory_of_block}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
runtime_version {{ major: {CUDA_RUNTIME[0]} minor: {CUDA_RUNTIME[1]} }}
device_description_str: "{gpu.name}"
"""
