"""Weights in 8 or 4 bits: how a matrix becomes integers and scales, and what stands for it in a model.

8 bits: symmetric, a scale for each row, or each group of columns of a row. 4 bits: a scale and a zero for
each group, found by search: of the group's range, cut by more and more, the one of least squared error.
"""

from collections.abc import Callable
from functools import partial
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8, UInt8

from llama_jax.numerics.matmul import working_dtype

_INT8_MOST = 127
_INT4_LEAST, _INT4_MOST = -8, 7
# of a group's range; below half of it, an outlier is worth more than all the others
_CUTS = tuple(1 - 0.02 * step for step in range(25))


class QuantizedWeight(nnx.Module):
    """In the place of a weight [*stack, out, in]: `weight[...]` is the matrix it stands for.

    8 bits: codes int8 [*stack, out, in] times scale [*stack, out], or, in groups, codes
    [*stack, out, groups, group] times [*stack, out, groups]. 4 bits: codes uint8
    [*stack, out, groups, group / 2], the low half of each byte for the first half of a group and the high
    half for the second, times scale plus zero, both [*stack, out, groups]. Scales and zeros have the dtype
    of the weight.
    """

    def __init__(self, weight: nnx.Param[Array], bits: int, group_size: int | None):
        """`group_size`: how many columns share a scale; None, in 8 bits only: all of a row."""
        self.axes = weight.get_metadata("axes")
        self.bits, self.group_size = bits, group_size
        stored = _each_matrix(_QUANTIZE[bits], group_size, weight[...])
        of_codes = self.axes if group_size is None else (*self.axes, "hidden")
        self.codes = nnx.Param(stored[0], axes=of_codes)
        self.scale = nnx.Param(stored[1], axes=of_codes[:-1])
        if bits == 4:
            self.zero = nnx.Param(stored[2], axes=of_codes[:-1])

    @property
    def dtype(self) -> jnp.dtype:
        """Of the matrix it stands for."""
        return self.scale.dtype

    def __getitem__(self, _: EllipsisType) -> Float[Array, "*stack out in"]:
        """The matrix."""
        if self.bits == 4:
            return dequantize_int4(self.codes[...], self.scale[...], self.zero[...])
        values = dequantize_int8(self.codes[...], self.scale[...])
        return values if self.group_size is None else values.reshape(*values.shape[:-2], -1)


def quantize_int8(
    weight: Float[Array, "out in"], group_size: int | None = None
) -> tuple[Int8[Array, "*rows columns"], Float[Array, "*rows"]]:
    """Codes from -127 to 127 and the scale of each row or group, its largest value at 127."""
    wide = weight.astype(working_dtype(weight.dtype))
    if group_size is not None:
        wide = wide.reshape(len(weight), -1, group_size)
    scale = (jnp.max(jnp.abs(wide), axis=-1) / _INT8_MOST).astype(weight.dtype)
    codes = jnp.round(wide / _divisor(scale, wide.dtype))
    return jnp.clip(codes, -_INT8_MOST, _INT8_MOST).astype(jnp.int8), scale


def dequantize_int8(
    codes: Int8[Array, "*stack in"], scale: Float[Array, "*stack"]
) -> Float[Array, "*stack in"]:
    """codes * scale, rounded once."""
    working = working_dtype(scale.dtype)
    return (codes.astype(working) * scale.astype(working)[..., None]).astype(scale.dtype)


def quantize_int4(
    weight: Float[Array, "out in"], group_size: int
) -> tuple[UInt8[Array, "out groups half"], Float[Array, "out groups"], Float[Array, "out groups"]]:
    """Codes from -8 to 7, two a byte, and the scale and zero of each group, of least squared error."""
    wide = weight.astype(working_dtype(weight.dtype)).reshape(len(weight), -1, group_size)
    low, high = jnp.min(wide, axis=-1), jnp.max(wide, axis=-1)

    def cut(part: Array) -> tuple[Array, Array, Array]:
        """Squared error, scale and zero where the codes span this part of each range."""
        scale = ((high - low) * part / (_INT4_MOST - _INT4_LEAST)).astype(weight.dtype)
        stretched = scale.astype(wide.dtype)
        # the codes' own middle is -1/2
        zero = ((low + high + stretched) / 2).astype(weight.dtype)
        restored = _codes(wide, scale, zero) * stretched[..., None]
        error = jnp.sum(jnp.square(restored + zero.astype(wide.dtype)[..., None] - wide), axis=-1)
        return error, scale, zero

    def better(best: Any, part: Array) -> tuple[Any, None]:
        found = cut(part)
        wins = found[0] < best[0]
        return jax.tree.map(partial(jnp.where, wins), found, best), None

    parts = jnp.asarray(_CUTS, wide.dtype)
    (_, scale, zero), _ = jax.lax.scan(better, cut(parts[0]), parts[1:])
    codes = (_codes(wide, scale, zero) - _INT4_LEAST).astype(jnp.uint8)
    first, second = jnp.split(codes, 2, axis=-1)
    return first | (second << jnp.uint8(4)), scale, zero


def dequantize_int4(
    codes: UInt8[Array, "*stack groups half"],
    scale: Float[Array, "*stack groups"],
    zero: Float[Array, "*stack groups"],
) -> Float[Array, "*stack in"]:
    """codes * scale + zero, rounded once."""
    working = working_dtype(scale.dtype)
    halves = codes & jnp.uint8(15), codes >> jnp.uint8(4)
    wide = jnp.concatenate(halves, axis=-1).astype(working) + _INT4_LEAST
    wide = wide * scale.astype(working)[..., None] + zero.astype(working)[..., None]
    return wide.astype(scale.dtype).reshape(*scale.shape[:-1], -1)


def _codes(wide: Array, scale: Array, zero: Array) -> Array:
    distance = wide - zero.astype(wide.dtype)[..., None]
    return jnp.clip(jnp.round(distance / _divisor(scale, wide.dtype)), _INT4_LEAST, _INT4_MOST)


def _divisor(scale: Array, dtype: jnp.dtype) -> Array:
    """The scales as divisors: 1 in place of the 0 of a group of equal values."""
    return jnp.where(scale == 0, 1, scale).astype(dtype)[..., None]


_QUANTIZE: dict[int, Callable[..., tuple[Array, ...]]] = {8: quantize_int8, 4: quantize_int4}


@partial(jax.jit, static_argnums=(0, 1))
def _each_matrix(
    quantize: Callable[..., tuple[Array, ...]], group_size: int | None, weight: Array
) -> tuple[Array, ...]:
    """One matrix of a stack at a time, so that no more than one is ever held wide."""
    one = partial(quantize, group_size=group_size)
    return one(weight) if weight.ndim == 2 else jax.lax.map(one, weight)
