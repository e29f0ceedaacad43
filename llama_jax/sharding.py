"""Mesh axes, and which dimension of a parameter or an activation goes over which of them.

A mesh may have any of the four axes; what it lacks is not split. The model knows nothing of it but
`constrain`, which does nothing without an ambient mesh (`jax.set_mesh`).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

BATCH_AXES = ("data", "fsdp")
SEQUENCE_AXIS = "sequence"
TENSOR_AXIS = "tensor"
MESH_AXES = (*BATCH_AXES, SEQUENCE_AXIS, TENSOR_AXIS)

# Logical axes, as parameters declare them (`layers.parameter`) and activations name them. The first
# mesh axis is the outermost. Weights are split over fsdp and sequence alike (ZeRO: every device that
# sees other tokens can hold another part), over tensor as in Megatron-LM (arXiv:1909.08053).
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "embed": ("fsdp", SEQUENCE_AXIS),
    "vocab": (TENSOR_AXIS,),
    "labels": (),
    "heads": (TENSOR_AXIS,),
    "kv_heads": (TENSOR_AXIS,),
    "mlp": (TENSOR_AXIS,),
    "batch": BATCH_AXES,
    "sequence": (SEQUENCE_AXIS,),
    "hidden": (),
}
# the residual stream [batch, seq, hidden]
RESIDUAL_AXES = ("batch", "sequence", "hidden")


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


def partition_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The spec of an array whose dimensions have the logical names `axes`, over mesh axes of `sizes`.

    A mesh axis that does not divide its dimension is left out: that dimension is replicated over it.
    """
    assert len(axes) == len(shape), f"{axes} for shape {shape}"
    spec: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        taken: list[str] = []
        for axis in RULES[name]:
            parts = sizes.get(axis, 1)
            if parts > 1 and size % parts == 0:
                taken.append(axis)
                size //= parts
        spec.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*spec)


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """The sharding of every parameter of `model` (abstract or real), as a tree of plain dicts."""

    def sharding(variable: nnx.Variable[Any]) -> NamedSharding:
        axes = variable.get_metadata("axes")
        return NamedSharding(mesh, partition_spec(axes, variable.get_value().shape, mesh.shape))

    state = nnx.state(model, nnx.Param)
    flat = [(path, leaf.replace(sharding(leaf))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def constrain(x: Shaped[Array, "..."], *axes: str) -> Shaped[Array, "..."]:
    """`x` with its dimensions split as their logical names say; `x` itself without an ambient mesh."""
    axes_of_mesh = mesh_axes()
    if not axes_of_mesh.sizes:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, axes_of_mesh.sizes))
