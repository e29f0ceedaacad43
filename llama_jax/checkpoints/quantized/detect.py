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
from llama_jax.files.foreign_weights import ForeignQuantization, foreign_quantization
from llama_jax.files.json_object import read_json_object

_MODELOPT = "hf_quant_config.json"
# files of AutoGPTQ and AutoAWQ, where config.json says nothing, and their quant_method if they have none
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
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
    return None if config is None else _scheme(file, config)


def read_scheme_beside(directory: Path) -> Scheme | None:
    """The scheme that a file of the program beside config.json tells, for weights that look quantized.

    Raises:
        ValueError: a file that cannot be read, a scheme that is not supported, or settings that it does not
            have.
    """
    for file, method in _BESIDE.items():
        if (directory / file).exists():
            own = {"quant_method": method, **read_json_object(directory / file)}
            config = foreign_quantization({"quantization_config": own})
            assert config is not None
            return _scheme(file, config)
    return None


def _scheme(file: str, config: ForeignQuantization) -> Scheme:
    try:
        if config.method not in _SCHEMES:
            raise ValueError("use the original, unquantized checkpoint")
        return _SCHEMES[config.method](config.fields, config.title)
    except ValueError as error:
        place = f"{file}: {config.key}" if file == "config.json" else file
        raise ValueError(
            f"{place}: the weights are quantized ({config.title}), which is not supported: {error}"
        ) from None
