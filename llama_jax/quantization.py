"""Models with weights in 8 or 4 bits: made, described, undone."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from llama_jax.config import QUANT_METHOD
from llama_jax.quantized_weight import QuantizedWeight

Model = TypeVar("Model", bound=nnx.Module)

DEFAULT_GROUP_SIZE = 128


class Quantization(NamedTuple):
    """How a model was quantised; `group_size` is of 4 bits only."""

    bits: int
    group_size: int | None

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` as config.json has it."""
        return {"quant_method": QUANT_METHOD, **self._asdict()}


def quantize(model: Model, bits: int, group_size: int | None = DEFAULT_GROUP_SIZE) -> Model:
    """A model like `model`, unchanged itself, whose matrices are held in 8 or 4 bits.

    It works wherever the model does, but has no gradient. Each matrix is restored, in the model's dtype,
    where it is multiplied with. 8 bits: every projection, the embedding and the head, by rows.
    4 bits: the projections whose input dimension `group_size` divides, by groups of so many columns; the
    others, the embedding and the head in 8. Norms, biases and the heads of tasks stay as they are.

    Args:
        bits: 8 or 4.
        group_size: for 4 bits, an even number.

    Raises:
        ValueError: other bits or group sizes, one that divides no input dimension, a quantised model.
    """
    quantization = _checked(bits, group_size)
    if quantization_of(model) is not None:
        raise ValueError("model: found quantised weights, expected a model that is not quantised")
    copy = nnx.merge(*nnx.split(model))
    matrices = _matrices(copy)
    if quantization.group_size is not None:
        sizes = {weight.shape[-1] for weight in map(_weight, matrices) if _is_projection(weight)}
        if all(size % quantization.group_size for size in sizes):
            raise ValueError(
                f"group_size: found {group_size}, expected a divisor of one of the input dimensions "
                f"{', '.join(map(str, sorted(sizes)))}"
            )
    for module in matrices:
        weight = _weight(module)
        size = quantization.group_size
        grouped = size is not None and _is_projection(weight) and weight.shape[-1] % size == 0
        module.weight = QuantizedWeight(weight, size if grouped else None)
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
    found = [module for module in _modules(model) if isinstance(module, QuantizedWeight)]
    if not found:
        return None
    sizes = {weight.group_size for weight in found} - {None}
    return Quantization(4, sizes.pop()) if sizes else Quantization(8, None)


def read_quantization(fields: Mapping[str, Any]) -> Quantization | None:
    """What config.json says in `quantization_config` if that is ours, else None.

    Raises:
        ValueError: bits or a group size that we do not have.
    """
    found = fields.get("quantization_config")
    if not isinstance(found, Mapping) or found.get("quant_method") != QUANT_METHOD:
        return None
    try:
        return _checked(found.get("bits"), found.get("group_size"))
    except ValueError as error:
        raise ValueError(f"quantization_config: {error}") from None


def matrices_by_bits(model: nnx.Module) -> dict[int, int]:
    """How many matrices of a quantised model are in 4 bits and in 8."""
    found = [module for module in _modules(model) if isinstance(module, QuantizedWeight)]
    counts = {4: 0, 8: 0}
    for weight in found:
        stack = weight.axes.count("layers")
        counts[8 if weight.group_size is None else 4] += math.prod(weight.scale.shape[:stack])
    return counts


def weight_bytes(model: nnx.Module) -> int:
    """Bytes of all weights of `model` (abstract or real)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))


def _checked(bits: Any, group_size: Any) -> Quantization:
    if bits not in (4, 8) or isinstance(bits, bool):
        raise ValueError(f"bits: found {bits!r}, expected 8 or 4")
    if bits == 8:
        return Quantization(8, None)
    if not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        raise ValueError(f"group_size: found {group_size!r}, expected a positive even number")
    return Quantization(4, group_size)


def _modules(model: nnx.Module) -> list[Any]:
    return [module for _, module in nnx.iter_modules(model)]


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


def _weight(module: Any) -> nnx.Param:
    return module.weight


def _matrix_axes(weight: nnx.Param) -> tuple[str, ...]:
    return tuple(axis for axis in weight.get_metadata("axes") if axis != "layers")


def _is_projection(weight: nnx.Param) -> bool:
    """Not the embedding or the language-model head, on which the output depends most."""
    return "vocab" not in _matrix_axes(weight)
