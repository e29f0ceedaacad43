"""Devices that no machine of the tests has, as far as the layout of a mesh looks at them."""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What the layout of a mesh asks of a JAX device."""

    coords: tuple[int, int, int]
    slice_index: int = 0
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    platform: str = "tpu"
    process_index: int = 0

    @property
    def id(self) -> tuple[int, ...]:
        return (self.slice_index, *self.coords)


def chips(lengths: tuple[int, int, int], slices: int = 1) -> list[Chip]:
    """The chips of slices of a shape."""
    places = itertools.product(*map(range, lengths))
    return [Chip(place, index) for index, place in itertools.product(range(slices), places)]


@dataclass(frozen=True)
class Client:
    """What compiles for, or runs, a GPU."""

    runtime_type: str


@dataclass(frozen=True)
class Gpu:
    """What the layout of a mesh asks of a GPU."""

    id: int
    process_index: int
    slice_index: int
    client: Client
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def gpus(hosts: int, each: int, real: bool = False) -> list[Gpu]:
    """GPUs as of a described topology, where all are of slice 0, or as real ones of a process each."""
    if real:
        client = Client("stream_executor")
        return [Gpu(number, number, number // each, client) for number in range(hosts * each)]
    client = Client("compile_only_runtime")
    return [Gpu(number, number // each, 0, client) for number in range(hosts * each)]
