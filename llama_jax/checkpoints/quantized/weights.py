"""The tensors of a checkpoint put together to weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llama_jax.checkpoints.quantized.scheme import Arrays, Parts, Read, Scheme, Weight
from llama_jax.checkpoints.safetensors_read import (
    TORCH_DTYPES,
    DequantizedTensor,
    KeptCodes,
    StoredTensor,
)

# scales of activations and of the key/value cache, which other programs quantize as they run
_IGNORED = re.compile(
    r"\.(input_scale|input_zero_point|input_global_scale|input_scale_ub|activation_scale|output_scale"
    r"|[kqv]_scale|kv_scale|[kqv]_zero_point|prob_output_scale)$"
)


_Values = Callable[[Arrays], np.ndarray]


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
    if not (count or problems or scheme.optional):
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

    def computed(
        suffix: str, dtype: str, shape: tuple[int, ...], values: _Values
    ) -> DequantizedTensor:
        def read_and_compute() -> np.ndarray:
            try:
                result = values({part: read(parts[part]) for part in weight.parts})
            except ValueError as error:
                raise ValueError(f"{stored[0].path}: tensor {name}: {error}") from None
            return result.reshape(shape)

        return DequantizedTensor(
            path=stored[0].path,
            name=name + suffix,
            dtype=dtype,
            shape=shape,
            offset=stored[0].offset,
            nbytes=sum(part.nbytes for part in stored),
            parts=stored,
            values=read_and_compute,
        )

    dequantized = computed("", "F32", weight.shape, weight.values)
    if (integers := weight.integers) is None or integers.bits not in (4, 8):
        return dequantized
    bits, size = integers.bits, integers.group_size
    rows, columns = weight.shape
    groups = () if size is None and bits == 8 else (columns // (size or columns),)
    if bits == 4 and (size or columns) % 2:
        return dequantized
    last = columns if not groups else (size or columns) * bits // 8

    def codes(arrays: Arrays) -> np.ndarray:
        signed = integers.codes(arrays)
        return signed if bits == 8 else _in_halves(signed.reshape(rows, *groups, -1))

    kept = [
        computed(".codes", "I8" if bits == 8 else "U8", (rows, *groups, last), codes),
        computed(".scale", integers.scale_dtype, (rows, *groups), integers.scale),
    ]
    if bits == 4:
        zeros = computed(
            ".zero", integers.scale_dtype, (rows, *groups), lambda _: np.zeros((rows, *groups))
        )
        kept.append(zeros)
    size = (size or columns) if bits == 4 else size
    return replace(dequantized, kept=KeptCodes(bits, size, tuple(kept)))


def _in_halves(codes: np.ndarray) -> np.ndarray:
    """Signed codes of groups as a `QuantizedWeight` has them, two a byte."""
    first, second = np.split((codes + np.int8(8)).view(np.uint8), 2, axis=-1)
    return first | second << 4


def with_codes(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], int, int | None]:
    """Tensors as a model quantized by this library has them, with bits and group size.

    Raises:
        ValueError: weights whose codes cannot be kept, or that do not have the same bits and groups.
    """
    result: dict[str, StoredTensor] = {}
    kinds: dict[tuple[int, int | None], str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DequantizedTensor):
            result[name] = tensor
            continue
        kept = tensor.kept
        if kept is None or ".layers." not in name:
            raise ValueError(
                f"dequantize=False: {name}: its codes cannot be kept: only symmetric ones with 8 or 4 bits "
                "in projections"
            )
        kinds.setdefault((kept.bits, kept.group_size), name)
        result |= {part.name: part for part in kept.tensors}
    if len(kinds) != 1:
        found = ", ".join(
            f"{bits} bits and groups of {size} ({n})" for (bits, size), n in kinds.items()
        )
        raise ValueError(
            f"dequantize=False: found {found or 'no quantized weights'}, expected one kind"
        )
    ((bits, size),) = kinds
    return result, bits, size
