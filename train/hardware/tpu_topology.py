"""TPUs you can compile for without having them: slices by name, and where they wrap around."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from llama_jax.formatting import first_line

# Without these libtpu asks a metadata server, waits for other hosts and locks a TPU for itself, so that a
# second process could not plan. The accelerator type must be valid, but it is the topology that is compiled
# for.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}

CHIPS_OF_HOST = (2, 2, 1)
# Chips of the largest slice of a generation, and the shapes of those that are flat: Google Cloud's
# documentation, "TPU v4", "TPU v5p", "TPU v5e" and "TPU v6e".
LARGEST_3D = {"v4": 4096, "v5p": 6144}
GENERATIONS_2D = ("v5e", "v6e")
SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
CUBE, RING_2D = 4, 16


class Slices(NamedTuple):
    """Slices of one shape: their number, the generation of their TPUs, chips along each dimension."""

    number: int
    generation: str
    shape: tuple[int, ...]
    twisted: bool = False

    @property
    def name(self) -> str:
        """One slice, as libtpu calls it."""
        shape = "x".join(map(str, self.shape))
        return f"{self.generation}:{shape}{'_twisted' * self.twisted}"


def parse_tpu_topology(text: str) -> Slices:
    """The slices of "v5p:4x4x4", "v5p:4x4x8_twisted" or, two of them, "2xv5p:4x4x4".

    Raises:
        ValueError: another form, or a slice that does not exist.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(\w+):(\d+(?:x\d+)*)(_twisted)?", text.lower())
    known = (*LARGEST_3D, *GENERATIONS_2D)
    if match is None or match[2] not in known:
        raise ValueError(
            f"topology: found {text!r}, expected TPUs ({', '.join(known)}) such as v5p:4x4x4, v6e:16x16 or "
            "2xv5p:4x4x4, two slices, or GPUs such as h100:8"
        )
    shape = tuple(map(int, match[3].split("x")))
    slices = Slices(int(match[1] or 1), match[2], shape, match[4] is not None)
    if slices.number < 1:
        raise ValueError(f"topology: found {text!r}, expected at least one slice")
    if slices.number > 1 and slices.generation == "v4":
        raise ValueError(
            f"topology: found {text!r}, expected one slice: nothing is published about the network of v4"
        )
    expected = _expected_shape(slices)
    if expected is not None:
        raise ValueError(f"topology: found {text!r}, expected {expected}")
    return slices


def _expected_shape(slices: Slices) -> str | None:
    """What a slice's shape should be; None if it exists."""
    shape = sorted(slices.shape)
    if slices.generation in GENERATIONS_2D:
        if tuple(shape) in SHAPES_2D and not slices.twisted:
            return None
        return "one of " + ", ".join(f"{a}x{b}" for a, b in SHAPES_2D)
    cubes = all(length and length % CUBE == 0 for length in shape)
    if slices.twisted:
        n = shape[0]
        twistable = cubes and len(shape) == 3 and shape in ([n, n, 2 * n], [n, 2 * n, 2 * n])
        form = "n x n x 2n or n x 2n x 2n, n a multiple of 4, for a twisted torus"
        return None if twistable else form
    exists = len(shape) == 3 and (cubes or all(length in (1, 2, 4) for length in shape))
    largest = LARGEST_3D[slices.generation]
    if exists and math.prod(shape) <= largest:
        return None
    return f"three lengths that are multiples of 4, or 1, 2 or 4 each, and at most {largest} chips"


def wraparound(generation: str, shape: Sequence[int]) -> tuple[bool, ...]:
    """Along which dimensions of a slice its last chips are linked to the first.

    v4 and v5p wrap where every length is a multiple of 4, as whole cubes are joined by optical switches;
    v5e and v6e only along a length of 16, a side of the pod.
    """
    if generation in GENERATIONS_2D:
        return tuple(length == RING_2D for length in shape)
    return (all(length % CUBE == 0 for length in shape),) * len(shape)


class Torus(NamedTuple):
    """Of one slice: chips along each dimension, and whether the last is linked to the first."""

    lengths: tuple[int, ...]
    wraps: tuple[bool, ...]

    def links(self, spans: Sequence[int]) -> tuple[list[str], int]:
        """Names of the dimensions along which chips span more than one place, and their links to a chip.

        Two along a dimension whose whole ring they are, otherwise one.
        """
        names, count = [], 0
        for name, span, length, wraps in zip("xyz", spans, self.lengths, self.wraps, strict=False):
            if span > 1:
                names.append(name)
                count += 2 if span == length and wraps else 1
        return names, count


KINDS = {"TPU v4": "v4", "TPU v5": "v5p", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}


def torus_of(devices: Sequence[Any]) -> Torus | None:
    """The torus of a whole slice's devices; None for others than the TPUs that are known here."""
    generation = KINDS.get(devices[0].device_kind)
    if generation is None:
        return None
    dimensions = 2 if generation in GENERATIONS_2D else 3
    lengths = tuple(
        max(along) + 1 for along in zip(*(device.coords for device in devices), strict=True)
    )
    return Torus(lengths[:dimensions], wraparound(generation, lengths[:dimensions]))


def tpu_devices(slices: Slices) -> list[Any]:
    """Devices to compile for, not to run on, one for each chip.

    Call it before JAX initializes its backends: it selects the CPU, which does the compiling.

    Raises:
        ValueError: libtpu, the compiler for TPUs, is not installed, or refuses the slices.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "--topology needs libtpu, which is not installed; in the checkout: pip install '.[plan]'"
        )
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    shape = (*slices.shape, 1)[:3]
    wrap = (*wraparound(slices.generation, slices.shape), False)[:3]
    options: dict[str, Any] = {"num_slices": slices.number} if slices.number > 1 else {}
    if slices.generation in LARGEST_3D:
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        topology = topologies.get_topology_desc(
            topology_name=slices.name,
            platform="tpu",
            wrap=wrap,
            chips_per_host_bounds=tuple(map(min, shape, CHIPS_OF_HOST)),
            **options,
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(
            f"topology: libtpu refuses {slices.name!r} ({first_line(error)})"
        ) from None
    return list(topology.devices)
