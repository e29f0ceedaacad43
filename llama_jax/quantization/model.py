"""Quantize a model to 8 or 4 bits, inspect how it is quantized, and dequantize it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from llama_jax.config import QUANTIZED_BY, our_quantization
from llama_jax.numerics.scalars import is_integer, plain_number
from llama_jax.quantization.weight import QuantizedWeight

Model = TypeVar("Model", bound=nnx.Module)

# By default, the first of those that divide most input dimensions. Models that 128 does not divide are
# small, and of small ones more is lost.
_INT4_GROUP_SIZES = 128, 32


class Quantization(NamedTuple):
    """How a model is quantized.

    Attributes:
        bits: 8 or 4.
        group_size: columns that share a scale; None for a scale per row.
        vocabulary: whether the embedding and the head are quantized, too.

    Examples:
        >>> from llama_jax import Quantization
        >>> Quantization(bits=4, group_size=64)
        Quantization(bits=4, group_size=64, vocabulary=True)
    """

    bits: int
    group_size: int | None
    vocabulary: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json, with which transformers refuses to load it."""
        fields = {**QUANTIZED_BY, "bits": self.bits, "group_size": self.group_size}
        return fields if self.vocabulary else {**fields, "vocabulary": False}


def quantize(
    model: Model,
    bits: int,
    group_size: int | None = None,
    vocabulary: bool = True,
    *,
    symmetric: bool = False,
) -> Model:
    """A copy of `model` with its matrices in 8 or 4 bits.

    It can be used like `model`, but has no gradient: each matrix is dequantized to the model's dtype where
    it is used. 8 bits: all projections, the embedding and the head. 4 bits: the projections; embedding and
    head have 8 bits with a scale per row, as does a matrix whose input dimension is not a multiple of
    `group_size`. Norms, biases and task heads are not quantized.

    Args:
        model: any model of this library; it is not changed.
        bits: 8 or 4.
        group_size: columns that share a scale, an even number; default: a row with 8 bits; 128 with 4
            bits, or 32 if that divides more input dimensions.
        vocabulary: quantize the embedding and the head, too.
        symmetric: 4 bits without a zero, as `save_pretrained(compressed_tensors=True)` requires.

    Raises:
        ValueError: other bits, a group size that is not an even number or that divides no input dimension,
            or a model that is quantized already.

    Examples:
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForCausalLM, quantize
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
        >>> small = quantize(model, bits=4, group_size=4)
        >>> small.generate([[5, 6, 7]], max_new_tokens=2, eos_token_id=()).shape
        (1, 5)
    """
    copy = nnx.merge(*nnx.split(model))
    for matrix in matrices_to_quantize(copy, bits, group_size, vocabulary):
        weight = matrix.module.weight
        matrix.module.weight = QuantizedWeight(weight, matrix.bits, matrix.group_size, symmetric)
    return copy


class MatrixToQuantize(NamedTuple):
    """A module with a matrix, or a stack of matrices, and what its weight is to be quantized to."""

    module: Any
    bits: int
    group_size: int | None


def matrices_to_quantize(
    model: nnx.Module, bits: int, group_size: int | None, vocabulary: bool
) -> list[MatrixToQuantize]:
    """What `quantize` changes; raises its errors."""
    bits, size, _ = _checked(bits, group_size)
    if quantization_of(model) is not None:
        raise ValueError("the model is already quantized; dequantize it first")
    modules = [one for one in _matrices(model) if vocabulary or _is_projection(one.weight)]
    targets = [one for one in modules if bits == 8 or _is_projection(one.weight)]
    widths = sorted({one.weight.shape[-1] for one in targets})
    if bits == 4 and size is None:
        size = max(_INT4_GROUP_SIZES, key=lambda size: sum(width % size == 0 for width in widths))
    if size is None:
        return [MatrixToQuantize(module, bits, None) for module in modules]
    if all(width % size for width in widths):
        raise ValueError(
            f"group_size: found {size}, expected a divisor of one of the input dimensions "
            f"{', '.join(map(str, widths))}"
        )
    by_group = [one for one in targets if one.weight.shape[-1] % size == 0]
    return [
        MatrixToQuantize(one, bits, size) if one in by_group else MatrixToQuantize(one, 8, None)
        for one in modules
    ]


def dequantize(model: Model) -> Model:
    """A copy of the quantized `model` with ordinary weights, which computes the same.

    Examples:
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForCausalLM, dequantize, quantize
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
        >>> restored = dequantize(quantize(model, bits=8))
        >>> restored.lm_head.weight.dtype
        dtype('float32')
    """
    copy = nnx.merge(*nnx.split(model))
    for module in _modules(copy):
        if isinstance(weight := getattr(module, "weight", None), QuantizedWeight):
            module.weight = nnx.Param(weight[...], axes=weight.axes)
    return copy


def quantization_of(model: nnx.Module) -> Quantization | None:
    """How `model` is quantized; None if it is not."""
    weights = _quantized(model)
    vocabulary = any("vocab" in weight.axes for weight in weights)
    kinds = {Quantization(weight.bits, weight.group_size, vocabulary) for weight in weights}
    # 8 bits with a scale per row may stand for matrices that the group size does not divide
    return min(kinds, key=lambda kind: (kind.bits, kind.group_size is None)) if kinds else None


def read_quantization(fields: Mapping[str, Any]) -> Quantization | None:
    """The `quantization_config` of config.json if this library wrote it, else None.

    Raises:
        ValueError: its bits or group size are not supported.
    """
    quantization = our_quantization(fields)
    if quantization is None:
        return None
    try:
        vocabulary = quantization.get("vocabulary", True)
        if type(vocabulary) is not bool:
            raise ValueError(f"vocabulary: found {vocabulary!r}, expected true or false")
        checked = _checked(quantization.get("bits"), quantization.get("group_size"))
        return checked._replace(vocabulary=vocabulary)
    except ValueError as error:
        raise ValueError(f"quantization_config: {error}") from None


def matrices_by_bits(model: nnx.Module) -> dict[int, int]:
    """How many matrices of a quantized model have 4 bits and how many 8."""
    counts = {4: 0, 8: 0}
    for weight in _quantized(model):
        stack = weight.axes.count("layers")
        counts[weight.bits] += math.prod(weight.scale.shape[:stack])
    return counts


def weight_bytes(model: nnx.Module) -> int:
    """Bytes of all weights of `model` (abstract or real)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))


def _checked(bits: Any, group_size: Any) -> Quantization:
    bits, group_size = plain_number(bits), plain_number(group_size)
    if not is_integer(bits) or bits not in (4, 8):
        raise ValueError(f"bits: found {bits!r}, expected 8 or 4")
    if group_size is None:
        return Quantization(bits, None)
    if not is_integer(group_size) or group_size < 2 or group_size % 2:
        raise ValueError(f"group_size: found {group_size!r}, expected a positive even number")
    return Quantization(bits, group_size)


def _modules(model: nnx.Module) -> list[Any]:
    return [module for _, module in nnx.iter_modules(model)]


def _quantized(model: nnx.Module) -> list[QuantizedWeight]:
    return [module for module in _modules(model) if isinstance(module, QuantizedWeight)]


def _matrices(model: nnx.Module) -> list[Any]:
    """Modules whose weight is a matrix, or a stack of matrices, except task heads."""
    weights = ((module, getattr(module, "weight", None)) for module in _modules(model))
    return [
        module
        for module, weight in weights
        if isinstance(weight, nnx.Param)
        and len(axes := _matrix_axes(weight)) == 2
        and "labels" not in axes
    ]


def _matrix_axes(weight: nnx.Param[Any]) -> tuple[str, ...]:
    return tuple(axis for axis in weight.get_metadata("axes") if axis != "layers")


def _is_projection(weight: nnx.Param[Any]) -> bool:
    """False for the embedding and the language-model head, which the output depends on most."""
    return "vocab" not in _matrix_axes(weight)
