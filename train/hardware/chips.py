"""Data sheets of accelerators: the peak that MFU is a fraction of, memory and bandwidths."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.numerics.backend import GPU_MEMORY_FRACTION
from train.hardware.gpus import GPUS


class Chip(NamedTuple):
    """Of one JAX device: bfloat16 FLOPs/s, bytes of memory, bytes/s of memory and of links.

    link_bandwidth: of all links to other chips together, in one direction; of a GPU, NVLink's.
    network_bandwidth: of a GPU's share of the network cards of its host, in one direction; None where all
        chips are linked.
    memory_fraction: of the memory, what XLA may use.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float | None = None
    memory_fraction: float = 1.0

    @property
    def usable_memory(self) -> float:
        """Bytes that a program may use."""
        return self.memory * self.memory_fraction


GIB = 2.0**30


def _gpu(name: str, flops: float, nvlink: float, network: float) -> Chip:
    gpu = GPUS[name]
    return Chip(
        flops,
        gpu.memory,
        gpu.memory_bandwidth,
        nvlink,
        network,
        memory_fraction=GPU_MEMORY_FRACTION,
    )


# Google Cloud's and NVIDIA's data sheets; v2 and v3 have two devices a chip. The network is that of DGX
# systems: a card of 200 Gb/s for each A100, of 400 Gb/s for each of the others.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.2e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 0.82e12, 200e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2.77e12, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.64e12, 448e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 39.4 * GIB, 1.56e12, 300e9, 25e9, GPU_MEMORY_FRACTION),
    "NVIDIA A100-SXM4-80GB": _gpu("a100", 312e12, 300e9, 25e9),
    "NVIDIA H100 80GB HBM3": _gpu("h100", 989e12, 450e9, 50e9),
    "NVIDIA H200": _gpu("h200", 989e12, 450e9, 50e9),
    "NVIDIA B200": _gpu("b200", 2250e12, 900e9, 50e9),
}


def peak_flops(device: Any, dtype: Any) -> float | None:
    """Peak FLOPs/s of `device`: from its data sheet, on a CPU of a timed matmul; None if unknown.

    The devices of a CPU share its cores, so its peak is divided by their number.
    """
    if device.platform == "cpu":
        return measured_flops(dtype) / jax.local_device_count()
    chip = CHIPS.get(device.device_kind)
    return None if chip is None else chip.flops


def measured_flops(dtype: Any, size: int = 2048, rounds: int = 3) -> float:
    """FLOPs/s of a square matmul in `dtype`, accumulated in float32: the best of `rounds`."""
    a = jnp.ones((size, size), dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    matmul = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=wide))
    matmul(a).block_until_ready()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        matmul(a).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)
