"""NVIDIA GPUs as XLA's compiler has to know them."""

from typing import NamedTuple


class GpuModel(NamedTuple):
    """What XLA's compiler asks of a GPU, per device.

    capability: CUDA's compute capability, major and minor.
    cores: streaming multiprocessors. fpus: floating-point units of each.
    shared_memory, shared_memory_of_block: bytes of a core, and the most that one block can have.
    memory, memory_bandwidth, cache: bytes, bytes/s, and bytes of the L2 cache.
    clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    shared_memory: int
    shared_memory_of_block: int
    memory: int
    memory_bandwidth: int
    cache: int
    clock: float


# As the devices report themselves to CUDA: xla/backends/gpu/target_config/specs/*.txtpb of openxla/xla, but
# for the names of H200 and B300, which are other ones there than on the devices.
GPUS = {
    "a100": GpuModel(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        fpus=64,
        shared_memory=167936,
        shared_memory_of_block=166912,
        memory=85100068864,
        memory_bandwidth=2039040000000,
        cache=41943040,
        clock=1.41,
    ),
    "a100-40gb": GpuModel(
        name="NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        cores=108,
        fpus=64,
        shared_memory=167936,
        shared_memory_of_block=166912,
        memory=42331013120,
        memory_bandwidth=1555200000000,
        cache=41943040,
        clock=1.41,
    ),
    "h100": GpuModel(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        fpus=128,
        shared_memory=233472,
        shared_memory_of_block=232448,
        memory=84942979072,
        memory_bandwidth=3352320000000,
        cache=52428800,
        clock=1.98,
    ),
    "h200": GpuModel(
        name="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        fpus=128,
        shared_memory=233472,
        shared_memory_of_block=232448,
        memory=151397597184,
        memory_bandwidth=4800000000000,
        cache=52428800,
        clock=1.98,
    ),
    "b200": GpuModel(
        name="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        fpus=128,
        shared_memory=233472,
        shared_memory_of_block=232448,
        memory=191514411008,
        memory_bandwidth=7672320000000,
        cache=132644864,
        clock=1.965,
    ),
    "b300": GpuModel(
        name="NVIDIA B300 SXM6 AC",
        capability=(10, 3),
        cores=158,
        fpus=128,
        shared_memory=233472,
        shared_memory_of_block=232448,
        memory=297021865984,
        memory_bandwidth=7936000000000,
        cache=135528448,
        clock=1.965,
    ),
    "gb200": GpuModel(
        name="NVIDIA GB200",
        capability=(10, 0),
        cores=152,
        fpus=128,
        shared_memory=233472,
        shared_memory_of_block=232448,
        memory=197897748480,
        memory_bandwidth=7928064000000,
        cache=135528448,
        clock=2.062,
    ),
    "gb300": GpuModel(
        name="NVIDIA GB300",
        capability=(10, 3),
        cores=152,
        fpus=128,
        shared_memory=233472,
        shared_memory_of_block=232448,
        memory=297021079552,
        memory_bandwidth=7928064000000,
        cache=135528448,
        clock=2.07,
    ),
}
