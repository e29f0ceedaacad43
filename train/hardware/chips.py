"""Data sheets of accelerators: the peak that MFU is a fraction of, memory and bandwidths."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.numerics.matmul import working_dtype
from llama_jax.numerics.xla_options import GPU_MEMORY_FRACTION
from train.hardware.gpus import GPUS


class Chip(NamedTuple):
    """Of one JAX device: bfloat16 FLOPs/s, bytes of memory, bytes/s of memory and of links.

    link_bandwidth: of all links to other chips together, in one direction; of a GPU, NVLink's.
    network_bandwidth: of a device's share of the network cards of its host, in one direction: between
        hosts of GPUs, between slices of TPUs; None where it is not published.
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
    """A GPU of which a data sheet names dense FLOPs, and both links in gigabytes/s in one direction."""
    gpu = GPUS[name]
    return Chip(
        flops,
        gpu.memory,
        gpu.memory_bandwidth,
        nvlink * 1e9,
        network * 1e9,
        memory_fraction=GPU_MEMORY_FRACTION,
    )


# Google Cloud's and NVIDIA's data sheets; v2 and v3 have two devices a chip. NVIDIA states FLOPs with
# sparsity, twice what is here (H100 and H200: 1,979e12; eight of HGX B200 or B300: 36e15; 72 of GB200 or
# GB300 NVL72: 360e15), and NVLink in both directions together (600, 900 and 1,800 GB/s). The network is one
# card for each GPU, as in NVIDIA's own systems: ConnectX-6 of 200 Gb/s in DGX A100, ConnectX-7 of 400 Gb/s
# in DGX H100, H200 and B200 and GB200 NVL72, ConnectX-8 of 800 Gb/s in DGX B300 and GB300 NVL72.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.2e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 0.82e12, 200e9, 3.125e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2.77e12, 600e9, 6.25e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.64e12, 448e9, 12.5e9),
} | {
    GPUS[name].name: _gpu(name, flops, nvlink, network)
    for name, flops, nvlink, network in (
        ("a100", 312e12, 300, 25),
        ("a100-40gb", 312e12, 300, 25),
        ("h100", 989e12, 450, 50),
        ("h200", 989e12, 450, 50),
        ("b200", 2250e12, 900, 50),
        ("b300", 2250e12, 900, 100),
        ("gb200", 2500e12, 900, 50),
        ("gb300", 2500e12, 900, 100),
    )
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
    """FLOPs/s of a square matmul in `dtype`, accumulated in float32: the best of up to `rounds`.

    Where one takes long, so that chance has little part in its time, fewer do: a run waits for this.
    """
    a = jnp.ones((size, size), dtype)
    wide = working_dtype(dtype)
    matmul = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=wide))
    matmul(a).block_until_ready()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        matmul(a).block_until_ready()
        times.append(time.perf_counter() - begin)
        if sum(times) > 0.25:
            break
    return 2 * size**3 / min(times)
