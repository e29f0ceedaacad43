"""Quantized models of this library as compressed-tensors, with the same codes and scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int32, Shaped

from llama_jax.checkpoints.names import flat_params, name_table
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.quantization.model import Quantization

_CODES, _SCALE, _ZERO = ".weight.codes", ".weight.scale", ".weight.zero"


def config(quantization: Quantization) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    size = quantization.group_size
    weights = {
        "num_bits": quantization.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def stored_tensors(
    model: nnx.Module, quantization: Quantization
) -> tuple[list[TensorSpec], Iterator[tuple[str, np.ndarray]]]:
    """What a file has: for a quantized weight `weight_packed`, `weight_scale` and `weight_shape`.

    Raises:
        ValueError: 4-bit weights with a zero, an embedding that is quantized, or matrices of which some
            have other groups: compressed-tensors cannot hold them.
    """
    leaves, table = flat_params(model), name_table(model)
    advice = "quantize with vocabulary=False and symmetric=True to save as compressed-tensors"
    if quantization.vocabulary:
        raise ValueError(f"the embedding is quantized; {advice}")
    specs = []
    for name, target in table.items():
        leaf = leaves[target.path]
        shape = tuple(leaf.shape if target.layer is None else leaf.shape[1:])
        if name.endswith(_CODES):
            module = name.removesuffix(_CODES)
            scale = leaves[*target.path[:-1], "scale"]
            groups = () if scale.ndim == 2 else scale.shape[2:]
            bits = 4 if leaf.dtype == np.uint8 else 8
            size = shape[-1] * 8 // bits
            columns = int(np.prod(groups)) * size
            if (bits, size) != (quantization.bits, quantization.group_size or size):
                raise ValueError(
                    f"{name}: found {bits} bits and groups of {size} columns, expected "
                    f"{quantization.bits} bits and {quantization.group_size} in all matrices"
                )
            words = -(-columns * quantization.bits // 32)
            specs += [
                TensorSpec(f"{module}.weight_packed", np.dtype(np.int32), (shape[0], words)),
                TensorSpec(
                    f"{module}.weight_scale", np.dtype(scale.dtype), (shape[0], *(groups or (1,)))
                ),
                TensorSpec(f"{module}.weight_shape", np.dtype(np.int64), (2,)),
            ]
        elif name.endswith(_ZERO):
            if np.asarray(leaf).any():
                raise ValueError(f"{name}: found zeros other than 0; {advice}")
        elif not name.endswith(_SCALE):
            specs.append(TensorSpec(name, np.dtype(leaf.dtype), shape))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, target in table.items():
            if name.endswith((_SCALE, _ZERO)):
                continue
            values = _values(leaves[target.path], target.layer)
            if not name.endswith(_CODES):
                yield name, values
                continue
            module = name.removesuffix(_CODES)
            scale = _values(leaves[*target.path[:-1], "scale"], target.layer)
            columns = values.size // len(values) * (2 if quantization.bits == 4 else 1)
            yield f"{module}.weight_packed", packed_words(values)
            yield f"{module}.weight_scale", scale.reshape(len(scale), -1)
            yield f"{module}.weight_shape", np.array([len(values), columns])

    return specs, tensors()


def packed_words(
    codes: Shaped[np.ndarray, "rows *groups columns"],
) -> Int32[np.ndarray, "rows words"]:
    """Codes of a `QuantizedWeight` as unsigned integers, in order, in 32-bit words.

    >>> packed_words(np.array([[-128, -127, 0, 1]], np.int8))
    array([[-2122317568]], dtype=int32)
    """
    if (
        codes.dtype == np.uint8
    ):  # 4 bits: the first half of a group, and in the high bits the second
        halves = np.concatenate([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
        raw = halves[:, ::2] | halves[:, 1::2] << 4
    else:
        raw = codes.reshape(len(codes), -1).view(np.uint8) ^ np.uint8(128)
    padding = -raw.shape[1] % 4
    return np.ascontiguousarray(np.pad(raw, ((0, 0), (0, padding)))).view(np.int32)


def _values(leaf: Any, layer: int | None) -> np.ndarray:
    return np.asarray(leaf if layer is None else leaf[layer])
