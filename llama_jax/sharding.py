"""Mesh axes, and which dimensions of parameters and activations are split over which of them.

A mesh may have any of the five axes. The model knows of it only through `constrain`, which does nothing
without an ambient mesh (`jax.set_mesh`).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

STAGE_AXIS = "stage"
# rows are split over the stages before and after the layers, which a pipeline runs for all rows
BATCH_AXES = (STAGE_AXIS, "data", "fsdp")
SEQUENCE_AXIS = "sequence"
TENSOR_AXIS = "tensor"
MESH_AXES = (*BATCH_AXES, SEQUENCE_AXIS, TENSOR_AXIS)

# Logical axes of parameters (`layers.parameter`) and activations, and the mesh axes that split them,
# outermost first. Weights are split over both fsdp and sequence (ZeRO: devices with different tokens can
# hold different parts), and over tensor as in Megatron-LM (arXiv:1909.08053).
RULES: dict[str, tuple[str, ...]] = {
    "layers": (STAGE_AXIS,),
    "embed": ("fsdp", SEQUENCE_AXIS),
    "vocab": (TENSOR_AXIS,),
    "labels": (),
    "heads": (TENSOR_AXIS,),
    "kv_heads": (TENSOR_AXIS,),
    "mlp": (TENSOR_AXIS,),
    "batch": BATCH_AXES,
    "micro_batches": (),
    "sequence": (SEQUENCE_AXIS,),
    "residual_sequence": (SEQUENCE_AXIS, TENSOR_AXIS),
    "hidden": (),
}
# The residual stream [batch, seq, hidden], split by tokens over tensor as well (arXiv:2205.05198).
RESIDUAL_AXES = ("batch", "residual_sequence", "hidden")


class MeshAxes(NamedTuple):
    """A mesh, those of its axes that are not manual, and the sizes of those larger than 1."""

    mesh: Any
    free: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def in_shard_map(self) -> bool:
        """Whether other axes of the mesh are manual."""
        return len(self.free) < len(self.mesh.axis_names)

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of `names` with a size larger than 1."""
        return tuple(name for name in names if name in self.sizes)

    def size(self, *names: str) -> int:
        """The product of the sizes of `names`."""
        return math.prod(self.sizes.get(name, 1) for name in names)


def mesh_axes(mesh: Any = None) -> MeshAxes:
    """The axes of `mesh` or of the ambient mesh (`jax.set_mesh`), without those of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = tuple(name for name, kind in kinds if kind != AxisType.Manual)
    return MeshAxes(mesh, free, {name: mesh.shape[name] for name in free if mesh.shape[name] > 1})


def partition_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The spec of an array with the logical `axes`, on a mesh whose axes have `sizes`.

    A mesh axis that does not divide the dimension is left out: the dimension is replicated over it.
    """
    assert len(axes) == len(shape), f"{axes} for shape {shape}"
    spec: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        used: list[str] = []
        for axis in RULES[name]:
            parts = sizes.get(axis, 1)
            if parts > 1 and size % parts == 0:
                used.append(axis)
                size //= parts
        spec.append(tuple(used) if len(used) > 1 else used[0] if used else None)
    return PartitionSpec(*spec)


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """The sharding of every parameter of `model` on `mesh`, as nested dicts.

    Weights are split over the axes "fsdp" and "sequence" (ZeRO), and over "tensor" by heads, MLP and
    vocabulary. Any other axis, and one that does not divide the dimension, holds replicas.

    Args:
        model: any model of this library, real or abstract (`nnx.eval_shape`).
        mesh: with any of the axes "data", "fsdp", "sequence" and "tensor".

    Returns:
        `NamedSharding`s, in the tree of `nnx.to_pure_dict`.

    Examples:
        >>> import jax
        >>> from flax import nnx
        >>> from llama_jax import PRESETS, LlamaForCausalLM, parameter_shardings
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        >>> model = nnx.eval_shape(lambda: LlamaForCausalLM(PRESETS["tiny-4m"], rngs=nnx.Rngs(0)))
        >>> shardings = parameter_shardings(model, mesh)
        >>> type(shardings["model"]["norm"]["weight"]).__name__
        'NamedSharding'
    """

    def sharding(variable: nnx.Variable[Any]) -> NamedSharding:
        axes = variable.get_metadata("axes")
        return NamedSharding(mesh, partition_spec(axes, variable.get_value().shape, mesh.shape))

    state = nnx.state(model, nnx.Param)
    flat = [(path, leaf.replace(sharding(leaf))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def constrain(x: Shaped[Array, "..."], *axes: str) -> Shaped[Array, "..."]:
    """`x`, split as its logical axes say; unchanged without an ambient mesh."""
    sizes = mesh_axes().sizes
    if not sizes:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, sizes))
