"""Data sheets of accelerators: the peak that MFU is a fraction of, memory and bandwidths."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Chip(NamedTuple):
    """Of one JAX device: bfloat16 FLOPs/s, bytes of memory, bytes/s of memory and of links.

    link_bandwidth: of all links to other chips together, in one direction.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


GIB = 2.0**30

# Google Cloud's and NVIDIA's data sheets; v2 and v3 have two devices a chip.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.2e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 0.82e12, 200e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2.77e12, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.64e12, 448e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB, 1.56e12, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB, 2.04e12, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GIB, 3.35e12, 450e9),
    "NVIDIA H200": Chip(989e12, 141 * GIB, 4.8e12, 450e9),
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
