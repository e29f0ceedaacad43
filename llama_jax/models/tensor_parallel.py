"""Matmuls over a tensor axis along which the residual stream is split too, by tokens.

Sequence parallelism of Megatron-LM (arXiv:2205.05198): the tokens of a block's input are gathered, those of
its output summed and scattered, so that norms and saved activations exist once, not on every shard. Both
go around a ring, a shard's tokens at a time, while the tokens that are there are multiplied (collective
matmuls, doi:10.1145/3567955.3567959). Left to XLA, matmuls wait for their gathers, and its own collective
matmuls send three times the bytes (docs/log.md).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llama_jax.numerics.matmul import einsum, weight_gradient, working_dtype
from llama_jax.sharding import SEQUENCE_AXIS, TENSOR_AXIS, mesh_axes, partition_spec

Weights = tuple[Float[Array, "out in"], ...]


class Ring(NamedTuple):
    """The shards of the tensor axis, and the axes that split batch and sequence."""

    mesh: Any
    axes: frozenset[str]
    batch: tuple[str, ...] | str | None
    sequence: tuple[str, ...]
    size: int

    @property
    def residual(self) -> P:
        """Spec of arrays whose tokens are split over the tensor axis."""
        return P(self.batch, (*self.sequence, TENSOR_AXIS))

    @property
    def gathered(self) -> P:
        """Spec of arrays with all of a sequence shard's tokens."""
        return P(self.batch, self.sequence or None)

    @property
    def features(self) -> P:
        """Spec of arrays whose features are split over the tensor axis."""
        return P(self.batch, self.sequence or None, TENSOR_AXIS)


def find_ring(batch: int, seq: int, *features: int) -> Ring | None:
    """The ring of the ambient mesh; None if it does not split the tensor axis or divide these sizes."""
    axes = mesh_axes()
    sequence = axes.present(SEQUENCE_AXIS)
    size = axes.size(TENSOR_AXIS)
    divides = seq % axes.size(*sequence, TENSOR_AXIS) == 0
    if size == 1 or not divides or any(count % size for count in features):
        return None
    (rows,) = partition_spec(("batch",), (batch,), axes.sizes)
    return Ring(axes.mesh, frozenset(axes.free), rows, sequence, size)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def gather_matmul(
    ring: Ring,
    out_dtype: jnp.dtype,
    reduce_dtype: DTypeLike | None,
    x: Float[Array, "batch seq in"],
    weights: Weights,
) -> tuple[Float[Array, "batch seq out"], ...]:
    """x weight^T for every weight, with one gather for all of them.

    x has its tokens split over the ring, the weights their rows, the results their features. `reduce_dtype`
    is for the gradients of the weights, see `matmul.weight_gradient`.
    """
    return _gather_matmul(ring, out_dtype, x, weights)[0]


def _gather_matmul(
    ring: Ring, out_dtype: jnp.dtype, x: Array, weights: Weights
) -> tuple[tuple[Array, ...], Array]:
    """The results, and x with all tokens."""

    def run(x: Array, *weights: Array) -> tuple[tuple[Array, ...], Array]:
        multiply = [
            partial(einsum, "bsi,oi->bso", b=weight, out_dtype=out_dtype) for weight in weights
        ]
        *outs, gathered = _gather(ring, x, [*multiply, lambda chunk: chunk])
        return tuple(outs), gathered

    specs = [P(TENSOR_AXIS)] * len(weights), ((ring.features,) * len(weights), ring.gathered)
    return _over_ring(ring, run, (ring.residual, *specs[0]), specs[1])(x, *weights)


def _gather_matmul_forward(
    ring: Ring, out_dtype: jnp.dtype, reduce_dtype: DTypeLike | None, x: Array, weights: Weights
) -> tuple[tuple[Array, ...], tuple[Array, Weights]]:
    outs, gathered = _gather_matmul(ring, out_dtype, x, weights)
    return outs, (gathered, weights)


def _gather_matmul_backward(
    ring: Ring,
    out_dtype: jnp.dtype,
    reduce_dtype: DTypeLike | None,
    residuals: tuple[Array, Weights],
    cotangents: tuple[Array, ...],
) -> tuple[Array, Weights]:
    x, weights = residuals
    cotangents = tuple(cotangent.astype(x.dtype) for cotangent in cotangents)
    d_x = _matmul_scatter(ring, x.dtype, "bso,oi->bsi", cotangents, weights, P(TENSOR_AXIS))
    d_weights = tuple(
        weight_gradient("bso,bsi->oi", cotangent, x, reduce_dtype) for cotangent in cotangents
    )
    return d_x, d_weights


gather_matmul.defvjp(_gather_matmul_forward, _gather_matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def matmul_scatter(
    ring: Ring,
    out_dtype: jnp.dtype,
    reduce_dtype: DTypeLike | None,
    x: Float[Array, "batch seq in"],
    weight: Float[Array, "out in"],
) -> Float[Array, "batch seq out"]:
    """x weight^T, summed over the ring in float32 (float64 for float64) and rounded once.

    x has its features split over the ring, the weight its columns, the result its tokens.
    """
    return _matmul_scatter(ring, out_dtype, "bsi,oi->bso", (x,), (weight,), P(None, TENSOR_AXIS))


def _matmul_scatter_forward(
    ring: Ring, out_dtype: jnp.dtype, reduce_dtype: DTypeLike | None, x: Array, weight: Array
) -> tuple[Array, tuple[Array, Array]]:
    return matmul_scatter(ring, out_dtype, reduce_dtype, x, weight), (x, weight)


def _matmul_scatter_backward(
    ring: Ring,
    out_dtype: jnp.dtype,
    reduce_dtype: DTypeLike | None,
    residuals: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    x, weight = residuals

    def run(cotangent: Array, weight: Array) -> list[Array]:
        multiply = partial(einsum, "bso,oi->bsi", b=weight)
        return _gather(ring, cotangent, [multiply, lambda chunk: chunk])

    specs = (ring.residual, P(None, TENSOR_AXIS)), [ring.features, ring.gathered]
    d_x, gathered = _over_ring(ring, run, *specs)(cotangent.astype(x.dtype), weight)
    return d_x, weight_gradient("bso,bsi->oi", gathered, x, reduce_dtype)


matmul_scatter.defvjp(_matmul_scatter_forward, _matmul_scatter_backward)


def _matmul_scatter(
    ring: Ring,
    out_dtype: jnp.dtype,
    spec: str,
    operands: tuple[Array, ...],
    weights: Weights,
    weight_spec: P,
) -> Array:
    """The sum of all einsums of an operand and its weight, its tokens scattered over the ring."""
    working = working_dtype(operands[0].dtype)

    def run(operands: tuple[Array, ...], weights: Weights) -> Array:
        size = operands[0].shape[1] // ring.size
        here = jax.lax.axis_index(TENSOR_AXIS)

        def part(offset: int) -> Array:
            """What this shard adds to the tokens of the one at `offset`."""
            start = (here + offset) % ring.size * size
            chunks = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in operands)
            pairs = zip(chunks, weights, strict=True)
            first, *others = (einsum(spec, a, b, out_dtype=working) for a, b in pairs)
            return sum(others, first)

        ahead = behind = None
        for hops in range(ring.size // 2, 0, -1):
            ahead = _send(ring, part(hops) if ahead is None else ahead + part(hops), 1)
            if hops <= (ring.size - 1) // 2:
                behind = _send(ring, part(-hops) if behind is None else behind + part(-hops), -1)
        # fused with the sum, this matmul would wait for the last of it to arrive
        total = jax.lax.optimization_barrier(part(0))
        for arrived in (ahead, behind):
            total = total if arrived is None else total + arrived
        return total.astype(out_dtype)

    specs = (ring.features,) * len(operands), (weight_spec,) * len(weights)
    return _over_ring(ring, run, specs, ring.residual)(operands, weights)


def _gather(ring: Ring, x: Array, functions: list[Any]) -> list[Array]:
    """Each function of the tokens of all shards, in their order, computed as they arrive."""
    size = x.shape[1]
    here = jax.lax.axis_index(TENSOR_AXIS)
    outs: list[Array] = []
    for distance, chunk in _arrivals(ring, x):
        start = (here - distance) % ring.size * size
        parts = [function(chunk) for function in functions]
        if not outs:
            shapes = [(part.shape[0], size * ring.size, part.shape[2]) for part in parts]
            outs = [jnp.zeros(shape, part.dtype) for shape, part in zip(shapes, parts, strict=True)]
        outs = [
            jax.lax.dynamic_update_slice_in_dim(out, part, start, axis=1)
            for out, part in zip(outs, parts, strict=True)
        ]
    return outs


def _arrivals(ring: Ring, x: Array) -> Iterator[tuple[int, Array]]:
    """The tokens of every shard and how far behind this one it is; both directions are used."""
    yield 0, x
    ahead = behind = x
    for hops in range(1, ring.size // 2 + 1):
        ahead = _send(ring, ahead, 1)
        yield hops, ahead
        if hops <= (ring.size - 1) // 2:
            behind = _send(ring, behind, -1)
            yield -hops, behind


def _send(ring: Ring, x: Array, step: int) -> Array:
    """x of the shard `step` behind."""
    pairs = [(shard, (shard + step) % ring.size) for shard in range(ring.size)]
    return jax.lax.ppermute(x, TENSOR_AXIS, pairs)


def _over_ring(ring: Ring, run: Any, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(
        run,
        mesh=ring.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(ring.axes),
        check_vma=False,
    )
