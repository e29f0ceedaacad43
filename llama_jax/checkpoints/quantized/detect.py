"""Which program quantized a checkpoint, as its config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.checkpoints.quantized import (
    awq,
    bitsandbytes,
    compressed_tensors,
    fp4,
    fp8,
    gptq,
    mlx,
    modelopt,
    torchao,
)
from llama_jax.checkpoints.quantized.scheme import Scheme
from llama_jax.config import our_quantization
from llama_jax.files.foreign_weights import foreign_quantization
from llama_jax.files.json_object import read_json_object

_MODELOPT = "hf_quant_config.json"
_SCHEMES: dict[str, Callable[[Mapping[str, Any], str], Scheme]] = {
    "MLX": mlx.scheme,
    "awq": awq.scheme,
    "bitsandbytes": bitsandbytes.scheme,
    "compressed-tensors": compressed_tensors.scheme,
    "fbgemm_fp8": fp8.scheme,
    "fp8": fp8.scheme,
    "gptq": gptq.scheme,
    "modelopt": modelopt.scheme,
    "mxfp4": fp4.mxfp4,
    "torchao": torchao.scheme,
}


def read_scheme(fields: Mapping[str, Any], directory: Path) -> Scheme | None:
    """The scheme of a checkpoint; None if no other program quantized the weights.

    Args:
        fields: of its config.json.
        directory: where older versions of modelopt put a file of their own.

    Raises:
        ValueError: a scheme that is not supported, or settings that it does not have.
    """
    if our_quantization(fields):
        return None
    file, config = "config.json", foreign_quantization(fields)
    if config is None and (directory / _MODELOPT).exists():
        own = {"quant_method": "modelopt", **read_json_object(directory / _MODELOPT)}
        file, config = _MODELOPT, foreign_quantization({"quantization_config": own})
    if config is None:
        return None
    try:
        if config.method not in _SCHEMES:
            raise ValueError("use the original, unquantized checkpoint")
        return _SCHEMES[config.method](config.fields, config.title)
    except ValueError as error:
        raise ValueError(
            f"{file}: {config.key}: the weights are quantized ({config.title}), which is not "
            f"supported: {error}"
        ) from None
