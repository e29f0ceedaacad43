"""The tensors of a checkpoint put together to weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llama_jax.checkpoints.quantized.scheme import Parts, Read, Scheme, Weight
from llama_jax.checkpoints.safetensors_read import TORCH_DTYPES, DequantizedTensor, StoredTensor

# scales of activations and of the key/value cache, which other programs quantize as they run
_IGNORED = re.compile(
    r"\.(input_scale|input_zero_point|input_global_scale|input_scale_ub|activation_scale|output_scale"
    r"|[kqv]_scale|kv_scale|[kqv]_zero_point|prob_output_scale)$"
)


def dequantized(
    tensors: Mapping[str, StoredTensor], scheme: Scheme, fields: Mapping[str, Any], read: Read
) -> tuple[dict[str, StoredTensor], list[str], list[str]]:
    """Tensors as the model has them: quantized weights in place of the tensors that they consist of.

    Args:
        tensors: everything that is stored, by name.
        fields: of config.json.
        read: reads one of them, whatever its dtype.

    Returns:
        The tensors, problems (one for each weight whose parts do not fit together), and notes.
    """
    suffix = re.compile(rf"(.*)\.({'|'.join(map(re.escape, scheme.suffixes))})", re.DOTALL)
    modules: dict[str, dict[str, StoredTensor]] = {}
    result: dict[str, StoredTensor] = {}
    ignored: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if match := _IGNORED.search(name):
            ignored[match[1]] += 1
        elif match := suffix.fullmatch(name):
            dtype = TORCH_DTYPES.get(tensor.dtype, tensor.dtype)
            modules.setdefault(match[1], {})[match[2]] = replace(tensor, dtype=dtype)
        else:
            result[name] = tensor
    problems, zero_biases, count = [], 0, 0
    for module, parts in modules.items():
        some = next(iter(parts.values()))
        try:
            weight = scheme.weight(module, parts, read)
            if weight is None and (other := next((n for n in parts if n != "weight"), None)):
                raise ValueError(f"{other}: unexpected")
        except (ValueError, OSError) as error:
            problems.append(f"{some.path.name}: {module}.{error}")
            continue
        name = f"{module}.weight"
        if weight is None:
            result[name] = some
            continue
        count += 1
        result[name] = _tensor(name, weight, parts, read)
        bias = f"{module}.bias"
        if bias in result and not _has_bias(module, fields) and not read(result[bias]).any():
            del result[bias]
            zero_biases += 1
    if not count and not problems:
        problems.append(f"no weight is quantized, although config.json says {scheme.title}")
    notes = []
    if ignored:
        names = ", ".join(f"{name} ({count})" for name, count in ignored.items())
        notes.append(f"{names} ignored: activations and the key/value cache are not quantized here")
    if zero_biases:
        notes.append(f"{zero_biases} biases that are zero left out: the model has none")
    return result, problems, notes


def _has_bias(module: str, fields: Mapping[str, Any]) -> bool:
    """Whether the model has a bias there. AutoGPTQ stores one of zeros for every module."""
    return bool(fields.get("mlp_bias" if ".mlp." in module else "attention_bias"))


def _tensor(name: str, weight: Weight, parts: Parts, read: Read) -> DequantizedTensor:
    stored = tuple(parts[part] for part in weight.parts)

    def values() -> np.ndarray:
        arrays = {part: read(parts[part]) for part in weight.parts}
        try:
            result = weight.values(arrays)
        except ValueError as error:
            raise ValueError(f"{stored[0].path}: tensor {name}: {error}") from None
        assert result.shape == weight.shape
        assert result.dtype == np.float32
        return result

    return DequantizedTensor(
        path=stored[0].path,
        name=name,
        dtype="F32",
        shape=weight.shape,
        offset=stored[0].offset,
        nbytes=sum(part.nbytes for part in stored),
        parts=stored,
        values=values,
    )
