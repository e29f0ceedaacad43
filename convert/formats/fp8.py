"""`--dtype fp8` for Hugging Face: the projections in 8 bits with a scale a row, as compressed-tensors.

Programs that load it, as vLLM does, quantize activations by tokens while they run. The weights are stored
as `weight`, F8_E4M3 [out, in], and `weight_scale`, float32 [out, 1].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Shaped

from convert.casting import cast
from convert.checkpoint import Checkpoint
from llama_jax.checkpoints.quantized.packing import float8
from llama_jax.checkpoints.quantized.scheme import by_rows
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.files.buffers import empty

DTYPE = "fp8"
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT32 = np.dtype(np.float32)
_LARGEST = np.float32(448)
_SMALLEST_SCALE = np.float32(2.0**-100)
_PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
_ROWS = 2**17  # values quantized at a time, which stay in the processor's cache

# as llm-compressor's preset FP8_DYNAMIC
CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
            "output_activations": None,
        }
    },
}


def is_quantized(name: str) -> bool:
    """Whether a tensor is stored in 8 bits: embedding, head, norms and biases are not."""
    return _PROJECTION.fullmatch(name) is not None


def target_specs(checkpoint: Checkpoint) -> list[TensorSpec]:
    """The tensors as the reader will return them: projections dequantized, all else as it is."""
    return [
        TensorSpec(spec.name, _FLOAT32, spec.shape) if is_quantized(spec.name) else spec
        for spec in checkpoint.tensors
    ]


def cast_rule(name: str, values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """What becomes of a tensor: a projection is quantized and dequantized again."""
    if not is_quantized(name):
        return cast(name, values, dtype)

    def dequantized(part: slice) -> np.ndarray:
        codes, scale = quantized(cast(name, values[part], _FLOAT32))
        return float8(codes) * scale

    return by_rows(values.shape, dequantized)


def stored_bytes(spec: TensorSpec) -> int:
    """Bytes on disk of a tensor of `target_specs`."""
    return spec.size + 4 * spec.shape[0] if is_quantized(spec.name) else spec.nbytes


def stored_tensors(
    specs: Sequence[TensorSpec], load: Callable[[str], np.ndarray]
) -> tuple[list[TensorSpec], Callable[[str], np.ndarray]]:
    """What the files have: codes and scales in place of each projection, and what loads them in order."""
    stored: list[TensorSpec] = []
    for spec in specs:
        if is_quantized(spec.name):
            stored.append(TensorSpec(spec.name, _FP8, spec.shape))
            stored.append(TensorSpec(f"{spec.name}_scale", _FLOAT32, (spec.shape[0], 1)))
        else:
            stored.append(spec)
    scales: dict[str, np.ndarray] = {}

    def load_stored(name: str) -> np.ndarray:
        if name in scales:
            return scales.pop(name)
        values = load(name)
        if not is_quantized(name):
            return values
        codes = empty(values.shape, _FP8)
        scale = np.empty((len(values), 1), np.float32)
        step = max(1, _ROWS // values.shape[1])
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            codes[part], scale[part] = quantized(values[part])
        scales[f"{name}_scale"] = scale
        return codes

    return stored, load_stored


def quantized(
    values: Float[np.ndarray, "rows columns"],
) -> tuple[Shaped[np.ndarray, "rows columns"], Float32[np.ndarray, "rows 1"]]:
    """FP8 numbers and the scale of each row, whose largest magnitude is at 448.

    Scales have the digits of bfloat16, so that number * scale is exact in float32 and quantizing that again
    gives the same numbers and scales. Rows too small for any scale become zero.

    >>> codes, scale = quantized(np.float32([[1, -2, 0.5]]))
    >>> codes.astype(np.float32) * scale
    array([[ 0.9980469 , -1.9960938 ,  0.49902344]], dtype=float32)
    """
    wide = values.astype(np.float32, copy=False)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    scale = (largest / _LARGEST).astype(ml_dtypes.bfloat16).astype(np.float32)
    scale = np.where(largest == 0, np.float32(1), np.maximum(scale, _SMALLEST_SCALE))
    return (wide / scale).astype(_FP8), scale
