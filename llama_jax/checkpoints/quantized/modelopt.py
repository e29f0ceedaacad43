"""NVIDIA's Model Optimizer: FP8 with a scale for the tensor, and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_jax.checkpoints.quantized import fp8
from llama_jax.checkpoints.quantized.fp4 import packed_weight
from llama_jax.checkpoints.quantized.scheme import Parts, Read, Scheme, Weight

_ALGORITHMS = ("FP8", "NVFP4")


def scheme(fields: Mapping[str, Any], title: str) -> Scheme:
    """modelopt of a `quantization_config`."""
    inner = fields.get("quantization")
    algorithm = {**(inner if isinstance(inner, Mapping) else {}), **fields}.get("quant_algo")
    if algorithm not in (*_ALGORITHMS, None):  # None: only the cache is quantized
        raise ValueError(
            f"quant_algo: found {algorithm!r}, expected one of {', '.join(_ALGORITHMS)}"
        )
    by_tensor = fp8.scheme({}, title)

    def weight(module: str, parts: Parts, read: Read) -> Weight | None:
        if "weight" in parts and parts["weight"].dtype == "U8":
            return packed_weight(parts, "weight", microscaling=False, global_scale="weight_scale_2")
        return by_tensor.weight(module, parts, read)

    suffixes = (*by_tensor.suffixes, "weight_scale_2")
    return Scheme(f"{title}, {algorithm}", suffixes, weight, optional=algorithm is None)
