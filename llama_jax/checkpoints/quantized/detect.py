"""Which program quantized a checkpoint, as its config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def read_scheme(fields: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a parsed config.json; None if no other program quantized the weights.

    Raises:
        ValueError: a scheme that is not supported, or settings that it does not have.
    """
    config = None if our_quantization(fields) else foreign_quantization(fields)
    if config is None:
        return None
    try:
        if config.method not in _SCHEMES:
            raise ValueError("use the original, unquantized checkpoint")
        return _SCHEMES[config.method](config.fields, config.title)
    except ValueError as error:
        raise ValueError(
            f"config.json: {config.key}: the weights are quantized ({config.title}), which is not "
            f"supported: {error}"
        ) from None
