"""The mesh axes that split something, by name."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

BATCH_AXES = ("data", "fsdp")
SEQUENCE_AXIS = "sequence"
TENSOR_AXIS = "tensor"


class MeshAxes(NamedTuple):
    """A mesh, those of its axes that are ours to use, and the sizes of those that split anything."""

    mesh: Any
    free: tuple[str, ...]
    sizes: dict[str, int]

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of `names` that split anything."""
        return tuple(name for name in names if name in self.sizes)

    def size(self, *names: str) -> int:
        """Into how many parts `names` split together."""
        return math.prod(self.sizes.get(name, 1) for name in names)


def mesh_axes(mesh: Any = None) -> MeshAxes:
    """The axes of `mesh` or of the ambient mesh (`jax.set_mesh`), but those of a caller's `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = tuple(name for name, kind in kinds if kind != AxisType.Manual)
    return MeshAxes(mesh, free, {name: mesh.shape[name] for name in free if mesh.shape[name] > 1})
