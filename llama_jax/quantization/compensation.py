"""Codes of which later columns make up for the rounding of earlier ones: GPTQ (arXiv:2210.17323).

Scales and zeros stay those of `QuantizedWeight`, so the result is stored and read like any other.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.numerics.matmul import working_dtype
from llama_jax.quantization.weight import (
    CODE_RANGES,
    QUANTIZE,
    Stored,
    each_matrix,
    pack_int4,
    round_to_codes,
)

# Of the mean second moment of an input, added to each: without it, inputs that hardly vary would be
# given the rounding of all others.
_DAMPING = 0.01
_BLOCK = 128  # columns after which all later ones are brought up to date


class Compensation(NamedTuple):
    """How columns make up for the rounding of others, in every matrix with the same inputs.

    Attributes:
        order: of the columns, in which they are rounded: those with the largest inputs first (`act_order`
            in GPTQ's code).
        factor: the upper triangular U with U^T U the inverse of the damped moments, both in that order;
            float64.
    """

    order: Int[np.ndarray, " in"]
    factor: Float[np.ndarray, "in in"]


def compensation(moments: Float[np.ndarray, "in in"]) -> Compensation:
    """From the sum of the products x_i x_j over the inputs x, in float64."""
    order = np.argsort(-np.diag(moments), kind="stable")
    ordered = moments[np.ix_(order, order)]
    damping = _DAMPING * np.mean(np.diag(moments)) or 1.0  # all inputs are 0: any codes will do
    damped = ordered + damping * np.eye(len(ordered))
    # flipped, so that Cholesky's lower factor becomes an upper one
    inverse: np.ndarray = np.linalg.inv(np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1])
    return Compensation(order, inverse)


def compensated(
    weight: Float[Array, "out in"],
    how: Compensation,
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool = False,
) -> Stored:
    """Quantize a matrix so that its outputs for certain inputs change least.

    Columns are rounded one after the other, with the scales that plain rounding has.

    Args:
        weight: the matrix.
        how: `compensation` of its inputs.
        bits, group_size, symmetric: see `QuantizedWeight`.

    Returns:
        What `quantize_int8` or `quantize_int4` return, with other codes.
    """
    _, scale, *zeros = each_matrix(QUANTIZE[bits, symmetric], group_size, weight)
    by_group = scale.reshape(len(weight), -1)
    zero = zeros[0] if zeros else jnp.zeros_like(by_group)
    codes = _round_in_order(weight, by_group, zero, how.factor, how.order, CODE_RANGES[bits])
    if group_size is not None:
        codes = codes.reshape(len(weight), -1, group_size)
    return pack_int4(codes) if bits == 4 else codes.astype(jnp.int8), scale, *zeros


@partial(jax.jit, static_argnums=5)
def _round_in_order(
    weight: Float[Array, "out in"],
    scale: Float[Array, "out groups"],
    zero: Float[Array, "out groups"],
    factor: Float[Array, "in in"],
    order: Int[Array, " in"],
    code_range: tuple[int, int],
) -> Float[Array, "out in"]:
    """The codes, as numbers; `factor` is that of the columns in this order."""
    working = working_dtype(weight.dtype)
    width = weight.shape[1]
    group_size, padding = width // scale.shape[1], -width % _BLOCK
    scales, zeros = scale.astype(working).T, zero.astype(working).T
    columns = jnp.pad(weight.astype(working).T[order], ((0, padding), (0, 0)))
    # further columns that change none
    factor = jnp.pad(factor.astype(working), ((0, padding), (0, padding)))
    factor = factor + jnp.diag(jnp.where(jnp.arange(len(factor)) < width, 0, 1).astype(working))
    groups = jnp.pad(order // group_size, (0, padding))
    places = jnp.arange(_BLOCK)

    def round_block(columns: Array, start: Array) -> tuple[Array, Array]:
        def block(rows: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(rows, start, _BLOCK)

        coupling = block(factor)  # of the block's columns with all
        within = jax.lax.dynamic_slice_in_dim(coupling, start, _BLOCK, axis=1)
        of_group = block(groups)
        block_scale, block_zero = scales[of_group], zeros[of_group]

        def round_column(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            values, codes, errors = state
            column, scale, zero = values[index], block_scale[index], block_zero[index]
            code = round_to_codes(column, scale, zero, code_range)
            error = (column - (code * scale + zero)) / within[index, index]
            later = jnp.where(places > index, within[index], 0)
            values = values - jnp.outer(later, error)
            return values, codes.at[index].set(code), errors.at[index].set(error)

        values = block(columns)
        empty = jnp.zeros_like(values)
        _, codes, errors = jax.lax.fori_loop(0, _BLOCK, round_column, (values, empty, empty))
        is_later = jnp.arange(len(factor))[None] >= start + _BLOCK
        later = jnp.where(is_later, coupling, 0)
        return columns - later.T @ errors, codes

    _, codes = jax.lax.scan(round_block, columns, jnp.arange(0, width + padding, _BLOCK))
    in_order = codes.reshape(-1, len(weight))[:width]
    return jnp.zeros_like(in_order).at[order].set(in_order).T
