"""Models with weights in 8 or 4 bits: made, described, undone."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from llama_jax.config import QUANTIZED_BY, our_quantization
from llama_jax.numerics.scalars import is_integer, plain_number
from llama_jax.quantization.weight import QuantizedWeight

Model = TypeVar("Model", bound=nnx.Module)

INT4_GROUP_SIZE = 128  # unless told


class Quantization(NamedTuple):
    """How a model was quantised; columns that share a scale, None for all of a row."""

    bits: int
    group_size: int | None

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` as config.json has it; transformers refuses to load it."""
        return {**QUANTIZED_BY, **self._asdict()}


def quantize(model: Model, bits: int, group_size: int | None = None) -> Model:
    """A model like `model`, unchanged itself, whose matrices are held in 8 or 4 bits.

    It works wherever the model does, but has no gradient. Each matrix is restored, in the model's dtype,
    where it is multiplied with. 8 bits: every projection, the embedding and the head. 4 bits: the
    projections; embedding and head in 8 bits by rows. A matrix whose input dimension `group_size` does not
    divide is held in 8 bits by rows. Norms, biases and the heads of tasks stay as they are.

    Args:
        bits: 8 or 4.
        group_size: columns that share a scale, an even number; None: all of a row in 8 bits, 128 in 4.

    Raises:
        ValueError: other bits or group sizes, one that divides no input dimension, a quantised model.
    """
    bits, size = _checked(bits, group_size)
    if quantization_of(model) is not None:
        raise ValueError("model: found quantised weights, expected a model that is not quantised")
    copy = nnx.merge(*nnx.split(model))
    matrices = _matrices(copy)
    fine = [module for module in matrices if bits == 8 or _is_projection(module.weight)]
    if size is not None:
        widths = {module.weight.shape[-1] for module in fine}
        if all(width % size for width in widths):
            raise ValueError(
                f"group_size: found {size}, expected a divisor of one of the input dimensions "
                f"{', '.join(map(str, sorted(widths)))}"
            )
        fine = [module for module in fine if module.weight.shape[-1] % size == 0]
    for module in matrices:
        found = (bits, size) if module in fine else (8, None)
        module.weight = QuantizedWeight(module.weight, *found)
    return copy


def dequantize(model: Model) -> Model:
    """The model of ordinary weights that computes what the quantised `model` does."""
    copy = nnx.merge(*nnx.split(model))
    for module in _modules(copy):
        if isinstance(weight := getattr(module, "weight", None), QuantizedWeight):
            module.weight = nnx.Param(weight[...], axes=weight.axes)
    return copy


def quantization_of(model: nnx.Module) -> Quantization | None:
    """How `model` was quantised; None if it was not."""
    ways = {(weight.bits, weight.group_size) for weight in _quantized(model)}
    # those by rows in 8 bits may be the ones that no group divides
    return Quantization(*min(ways, key=lambda way: (way[0], way[1] is None))) if ways else None


def read_quantization(fields: Mapping[str, Any]) -> Quantization | None:
    """What config.json says in `quantization_config` if that is ours, else None.

    Raises:
        ValueError: bits or a group size that we do not have.
    """
    found = our_quantization(fields)
    if found is None:
        return None
    try:
        return _checked(found.get("bits"), found.get("group_size"))
    except ValueError as error:
        raise ValueError(f"quantization_config: {error}") from None


def matrices_by_bits(model: nnx.Module) -> dict[int, int]:
    """How many matrices of a quantised model are in 4 bits and in 8."""
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
        return Quantization(bits, INT4_GROUP_SIZE if bits == 4 else None)
    if not is_integer(group_size) or group_size < 2 or group_size % 2:
        raise ValueError(f"group_size: found {group_size!r}, expected a positive even number")
    return Quantization(bits, group_size)


def _modules(model: nnx.Module) -> list[Any]:
    return [module for _, module in nnx.iter_modules(model)]


def _quantized(model: nnx.Module) -> list[QuantizedWeight]:
    return [module for module in _modules(model) if isinstance(module, QuantizedWeight)]


def _matrices(model: nnx.Module) -> list[Any]:
    """Modules whose weight is a matrix, or a stack of them, but the heads of tasks."""
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
    """Not the embedding or the language-model head, on which the output depends most."""
    return "vocab" not in _matrix_axes(weight)
