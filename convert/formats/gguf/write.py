"""GGUF files out, as llama.cpp's converter writes a Llama, a tensor at a time.

Facts of `convert_hf_to_gguf.py`: vectors are float32 whatever the matrices are; the rows of the query and
key projections are interleaved (see `convert.formats.gguf.tensors`); a tied output projection is left
out; a matrix whose rows do not divide into blocks of Q8_0 is F16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
    LlamaFileType,
)

from convert.casting import Rule, cast, casts
from convert.checkpoint import DTYPES, Checkpoint
from convert.formats.gguf.config import description, hyperparameters
from convert.formats.gguf.ends import end_ids
from convert.formats.gguf.q8_0 import dequantised, divides, quantised
from convert.formats.gguf.rope_write import rope_scaling
from convert.formats.gguf.special_tokens import ends_of, unusable_sampling
from convert.formats.gguf.tensors import PLAIN, gguf_name
from convert.formats.gguf.tokenizer_proof import require_same_ids
from convert.formats.gguf.tokenizer_write import tokenizer_metadata
from convert.formats.rotary_rows import to_pairs
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig

_FLOAT32 = np.dtype(np.float32)
_TYPES = {dtype: type_ for type_, dtype in PLAIN.items()}
_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_VALUE_TYPES: dict[type, GGUFValueType] = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    np.int32: GGUFValueType.INT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
_ELEMENT_TYPES = _VALUE_TYPES | {int: GGUFValueType.INT32}
_CHUNK_BYTES = 2**24  # written at a time: bounds the copies


def specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as the reader will return them; of q8_0, what the blocks stand for, in float32.

    Raises ValueError, before anything is written, for a config, a dtype or a tokenizer that GGUF's llama
    does not have.
    """
    config = LlamaConfig.from_dict(checkpoint.config)
    hyperparameters(config)
    rope_scaling(config)
    require_same_ids(checkpoint.files, tokenizer_metadata(checkpoint.files, config), config)
    return [TensorSpec(s.name, _dtype(s, dtype), s.shape) for s in checkpoint.tensors]


def losses(checkpoint: Checkpoint) -> list[str]:
    """Ends of a generation that GGUF has no key for, or that llama.cpp adds; numbers it cannot take."""
    config, files = LlamaConfig.from_dict(checkpoint.config), checkpoint.files
    metadata = tokenizer_metadata(files, config)
    tokens = dict(enumerate(metadata.get("tokenizer.ggml.tokens", [])))
    wanted, found = ends_of(files, config), end_ids(metadata)

    def named(ids: list[int]) -> str:
        return ", ".join(f"{i} ({tokens[i]})" if i in tokens else str(i) for i in ids)

    notes = []
    if lost := [i for i in wanted if i not in found and 0 <= i < config.vocab_size]:
        notes.append(
            f"generations will not end at {named(lost)}: GGUF has keys for three such tokens "
            "(eos, eot, eom), which are taken"
        )
    if wanted and (more := [i for i in found if i not in wanted]):
        notes.append(
            f"llama.cpp will end generations at {named(more)} as well, which it knows by its text"
        )
    notes += [
        f"generation_config.json: {name} {str(value)[:40]} is no number to draw with, and left out"
        for name, value in unusable_sampling(files).items()
    ]
    if not {"license", "languages"} & checkpoint.facts.keys():
        notes.append(
            "license and languages are left out: no README.md beside the weights says them"
        )
    return notes


def rule(dtype: str | None) -> Rule:
    """What becomes of a tensor: for q8_0, a matrix is quantised and dequantised again."""
    if dtype != "q8_0":
        return casts(dtype)

    def apply(name: str, values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        if values.ndim > 1 and dtype == _FLOAT32:
            return dequantised(name, values)
        return cast(name, values, dtype)

    return apply


def stored_bytes(spec: TensorSpec, dtype: str | None) -> int:
    """Bytes of a tensor of `specs` in the file."""
    block, block_bytes = GGML_QUANT_SIZES[_type(spec, dtype)]
    return spec.size // block * block_bytes


def write(checkpoint: Checkpoint, path: Path, progress: Callable[[int], None]) -> None:
    """Write `checkpoint`, whose tensors are those of `specs` for its dtype, into the new file `path`.

    Raises OSError for the disk's faults, and what `checkpoint.load` raises.
    """
    config, dtype = LlamaConfig.from_dict(checkpoint.config), checkpoint.dtype
    scaling, factors = rope_scaling(config)
    matrix = next(spec for spec in checkpoint.tensors if len(spec.shape) > 1)
    metadata = {
        **description(checkpoint, path.stem),
        **hyperparameters(config),
        **scaling,
        "general.file_type": int(_FILE_TYPES[_type(matrix, dtype)]),
        **tokenizer_metadata(checkpoint.files, config),
    }
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        _add(writer, key, value)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for spec in checkpoint.tensors:
        name, size, type_ = gguf_name(spec.name), stored_bytes(spec, dtype), _type(spec, dtype)
        writer.add_tensor_info(name, spec.shape, spec.dtype, size, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()

    with path.open("ab") as file:
        _align(file)
        if factors is not None:
            file.write(factors.tobytes())
            _align(file)
        for spec in checkpoint.tensors:
            values = checkpoint.load(spec.name)
            for rows in _interleaved(values, _heads(spec.name, config)):
                data = quantised(rows) if _type(spec, dtype).name == "Q8_0" else rows
                progress(file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data))
            _align(file)


def _dtype(spec: TensorSpec, dtype: str | None) -> np.dtype[Any]:
    """What the reader returns of a tensor."""
    if len(spec.shape) == 1:
        return _FLOAT32
    if dtype == "q8_0":
        return _FLOAT32 if divides(spec.shape) else np.dtype(np.float16)
    found = spec.dtype if dtype is None else DTYPES[dtype]
    if found not in _TYPES:
        raise ValueError(
            f"tensor {spec.name} is {found}, expected --dtype float32, bfloat16, float16 or q8_0: "
            "GGUF's llama has no such matrices"
        )
    return found


def _type(spec: TensorSpec, dtype: str | None) -> GGMLQuantizationType:
    """How a tensor of `specs` is stored."""
    if dtype == "q8_0" and len(spec.shape) > 1 and spec.dtype == _FLOAT32:
        return GGMLQuantizationType.Q8_0
    return _TYPES[spec.dtype]


def _heads(name: str, config: LlamaConfig) -> int:
    """Over how many heads the rows of a tensor are interleaved; 0 where they are not."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.kv_heads if ".k_proj." in name else 0


def _interleaved(values: np.ndarray, heads: int) -> Iterator[np.ndarray]:
    """`values` in groups of rows, those of `heads` in llama.cpp's order."""
    unit = len(values) // heads if heads else 1
    unit_bytes = max(1, values[:unit].nbytes)
    step = max(1, _CHUNK_BYTES // unit_bytes) * unit
    for start in range(0, len(values), step):
        rows = values[start : start + step]
        if heads:
            rows = to_pairs(rows, len(rows) // unit)
        yield rows


def _align(file: Any) -> None:
    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        element = _ELEMENT_TYPES[type(value[0])]
        writer.add_key_value(key, value, GGUFValueType.ARRAY, element)
    else:
        writer.add_key_value(key, value, _VALUE_TYPES[type(value)])
