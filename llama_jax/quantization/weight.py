"""Weights in 8 or 4 bits: a matrix as integer codes and scales, and the module that holds them.

8 bits: symmetric, with a scale per row or per group of columns. 4 bits: a scale and an offset per group,
found by a search: the group's range is clipped more and more, and the least squared error wins.
"""

from collections.abc import Callable
from functools import partial
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8, UInt8

from llama_jax.numerics.few_rows import Codes, InMemory, codes_in_memory
from llama_jax.numerics.matmul import working_dtype

_INT8_MAX = 127
_INT4_MIN, _INT4_MAX = -8, 7
CODE_RANGES = {8: (-_INT8_MAX, _INT8_MAX), 4: (_INT4_MIN, _INT4_MAX)}  # by bits
# fractions of a group's range; below a half, the error of an outlier exceeds that of all others
_CLIP_FRACTIONS = tuple(1 - 0.02 * step for step in range(25))


# codes and scale, and with 4 bits zero
Stored = tuple[Array, ...]


class QuantizedWeight(nnx.Module):
    """Takes the place of a parameter [*stack, out, in]: `weight[...]` dequantizes it.

    8 bits: codes int8 [*stack, out, in] and scale [*stack, out] or, with groups, [*stack, out, groups,
    group] and [*stack, out, groups]. 4 bits: codes uint8 [*stack, out, groups, group / 2], whose low bits
    are the first half of a group and whose high bits the second, and scale and zero [*stack, out,
    groups]: code * scale + zero. Scales and zeros have the dtype of the weight.

    Args:
        weight: the parameter.
        bits: 8 or 4.
        group_size: columns that share a scale; None, for 8 bits only, is a scale per row.
        symmetric: 4 bits with a zero of 0; 8 bits have none anyway.
        stored: what to hold in place of `weight`; default: `weight` rounded.
    """

    def __init__(
        self,
        weight: nnx.Param[Array],
        bits: int,
        group_size: int | None,
        symmetric: bool = False,
        stored: Stored | None = None,
    ):
        self.axes = weight.get_metadata("axes")
        self.bits, self.group_size = bits, group_size
        if stored is None:
            stored = each_matrix(QUANTIZE[bits, symmetric], group_size, weight[...])
        axes = self.axes if group_size is None else (*self.axes, "hidden")
        self.codes = nnx.Param(stored[0], axes=axes)
        self.scale = nnx.Param(stored[1], axes=axes[:-1])
        if bits == 4:
            self.zero = nnx.Param(stored[2], axes=axes[:-1])

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the dequantized matrix."""
        return self.scale.dtype

    def __getitem__(self, _: EllipsisType) -> Float[Array, "*stack out in"]:
        """The dequantized matrix."""
        if self.bits == 4:
            return dequantize_int4(self.codes[...], self.scale[...], self.zero[...])
        values = dequantize_int8(self.codes[...], self.scale[...])
        return values if self.group_size is None else values.reshape(*values.shape[:-2], -1)

    def in_memory(self, x: Float[Array, "rows in"]) -> InMemory | None:
        """A matrix that is not stacked for `multiply_in_memory`, or None, see `codes_in_memory`."""
        codes, scale = self.codes[...], self.scale[...]
        if self.group_size is None:
            codes, scale = codes[:, None], scale[:, None]
        zero = self.zero[...] if self.bits == 4 else None
        return codes_in_memory(x, (codes, scale, zero), _widened)


def quantize_int8(
    weight: Float[Array, "out in"], group_size: int | None = None
) -> tuple[Int8[Array, "*rows columns"], Float[Array, "*rows"]]:
    """Codes from -127 to 127, and the scale of each row or group, whose largest element is at 127."""
    wide = weight.astype(working_dtype(weight.dtype))
    if group_size is not None:
        wide = wide.reshape(len(weight), -1, group_size)
    scale = (jnp.max(jnp.abs(wide), axis=-1) / _INT8_MAX).astype(weight.dtype)
    codes = round_to_codes(wide, scale.astype(wide.dtype)[..., None], 0, CODE_RANGES[8])
    return codes.astype(jnp.int8), scale


def dequantize_int8(
    codes: Int8[Array, "*stack in"], scale: Float[Array, "*stack"]
) -> Float[Array, "*stack in"]:
    """codes * scale, rounded once."""
    working = working_dtype(scale.dtype)
    return (codes.astype(working) * scale.astype(working)[..., None]).astype(scale.dtype)


def quantize_int4(
    weight: Float[Array, "out in"], group_size: int, symmetric: bool = False
) -> tuple[UInt8[Array, "out groups half"], Float[Array, "out groups"], Float[Array, "out groups"]]:
    """Codes from -8 to 7, two per byte, and the scale and zero of each group with least squared error.

    Args:
        symmetric: all zeros are 0.
    """
    wide = weight.astype(working_dtype(weight.dtype)).reshape(len(weight), -1, group_size)
    low, high = jnp.min(wide, axis=-1), jnp.max(wide, axis=-1)
    if symmetric:
        high = jnp.maximum(high, -low)
        low = -high

    def clip(fraction: Array) -> tuple[Array, Array, Array]:
        """Squared error, scale and zero if the codes span this fraction of each range."""
        scale = ((high - low) * fraction / (_INT4_MAX - _INT4_MIN)).astype(weight.dtype)
        step = scale.astype(wide.dtype)
        # the codes are centered at -1/2
        zero = jnp.zeros_like(scale) if symmetric else (low + high + step) / 2
        zero = zero.astype(weight.dtype)
        offset = zero.astype(wide.dtype)[..., None]
        codes = round_to_codes(wide, step[..., None], offset, CODE_RANGES[4])
        error = jnp.sum(jnp.square(codes * step[..., None] + offset - wide), axis=-1)
        return error, scale, zero

    def better(best: Any, fraction: Array) -> tuple[Any, None]:
        candidate = clip(fraction)
        is_better = candidate[0] < best[0]
        return jax.tree.map(partial(jnp.where, is_better), candidate, best), None

    fractions = jnp.asarray(_CLIP_FRACTIONS, wide.dtype)
    (_, scale, zero), _ = jax.lax.scan(better, clip(fractions[0]), fractions[1:])
    step, offset = (values.astype(wide.dtype)[..., None] for values in (scale, zero))
    return pack_int4(round_to_codes(wide, step, offset, CODE_RANGES[4])), scale, zero


def pack_int4(codes: Float[Array, "*groups group"]) -> UInt8[Array, "*groups half"]:
    """Codes from -8 to 7, two per byte."""
    first, second = jnp.split((codes - _INT4_MIN).astype(jnp.uint8), 2, axis=-1)
    return first | (second << jnp.uint8(4))


def dequantize_int4(
    codes: UInt8[Array, "*stack groups half"],
    scale: Float[Array, "*stack groups"],
    zero: Float[Array, "*stack groups"],
) -> Float[Array, "*stack in"]:
    """codes * scale + zero, rounded once."""
    working = working_dtype(scale.dtype)
    halves = codes & jnp.uint8(15), codes >> jnp.uint8(4)
    wide = jnp.concatenate(halves, axis=-1).astype(working) + _INT4_MIN
    wide = wide * scale.astype(working)[..., None] + zero.astype(working)[..., None]
    return wide.astype(scale.dtype).reshape(*scale.shape[:-1], -1)


def _widened(codes: Codes) -> Float[Array, "out in"]:
    values, scale, zero = codes
    if zero is not None:
        return dequantize_int4(values, scale, zero)
    return dequantize_int8(values, scale).reshape(len(values), -1)


def round_to_codes(
    values: Float[Array, "*shape"],
    scale: Float[Array, "*#shape"],
    zero: Float[Array, "*#shape"] | float,
    code_range: tuple[int, int],
) -> Float[Array, "*shape"]:
    """The codes nearest to `values`, as numbers; scale and zero are broadcast, and have their dtype."""
    divisor = jnp.where(scale == 0, 1, scale)  # of a group of zeros or of equal values
    return jnp.clip(jnp.round((values - zero) / divisor), *code_range)


# by bits, and whether symmetric
QUANTIZE: dict[tuple[int, bool], Callable[..., Stored]] = {
    (8, False): quantize_int8,
    (8, True): quantize_int8,
    (4, False): quantize_int4,
    (4, True): partial(quantize_int4, symmetric=True),
}


@partial(jax.jit, static_argnums=(0, 1))
def each_matrix(
    quantize: Callable[..., tuple[Array, ...]], group_size: int | None, weight: Array
) -> tuple[Array, ...]:
    """One matrix of a stack at a time, so that only one is held in the wide dtype."""
    one = partial(quantize, group_size=group_size)
    return one(weight) if weight.ndim == 2 else jax.lax.map(one, weight)
