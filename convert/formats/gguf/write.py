"""Write a GGUF file as llama.cpp's converter writes a Llama, a tensor at a time.

Facts of `convert_hf_to_gguf.py`: vectors are float32 whatever the matrices are; the rows of the query and
key projections are reordered (see `convert.formats.llama_tensors`); a tied output projection is left out; a
matrix whose rows do not divide into blocks of Q8_0 is F16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, size_label
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
    LlamaFileType,
)

from convert.casting import CastRule, cast
from convert.checkpoint import DTYPES, Checkpoint
from convert.formats.gguf.config import hyperparameters
from convert.formats.gguf.generation import sampling_metadata, unusable_sampling
from convert.formats.gguf.q8_0 import dequantized, divides_into_blocks, quantized
from convert.formats.gguf.rope import rope_scaling
from convert.formats.gguf.tensors import PLAIN_DTYPES, ROPE_FREQS, gguf_name
from convert.formats.gguf.tokenizer.ends import end_ids
from convert.formats.gguf.tokenizer.same_ids import require_same_ids
from convert.formats.gguf.tokenizer.special_tokens import end_tokens
from convert.formats.gguf.tokenizer.write import tokenizer_metadata
from convert.formats.llama_tensors import rotary_heads, to_pairs
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig

_FLOAT32 = np.dtype(np.float32)
_TYPES = {dtype: type_ for type_, dtype in PLAIN_DTYPES.items()}
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


def target_specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as the reader will return them; of q8_0, what the blocks stand for, in float32.

    Raises:
        ValueError: a config, a dtype or a tokenizer that GGUF's llama does not have.
    """
    config = LlamaConfig.from_dict(checkpoint.config)
    hyperparameters(config)
    rope_scaling(config)
    require_same_ids(checkpoint.files, tokenizer_metadata(checkpoint.files, config), config)
    return [TensorSpec(s.name, _dtype(s, dtype), s.shape) for s in checkpoint.tensors]


def losses(checkpoint: Checkpoint) -> list[str]:
    """End tokens that GGUF has no key for, or that llama.cpp adds; sampling it cannot express."""
    config, files = LlamaConfig.from_dict(checkpoint.config), checkpoint.files
    metadata = tokenizer_metadata(files, config)
    tokens = dict(enumerate(metadata.get("tokenizer.ggml.tokens", [])))
    ends, llama_cpp_ends = end_tokens(files, config), end_ids(metadata)

    def shown(ids: list[int]) -> str:
        return ", ".join(f"{i} ({tokens[i]})" if i in tokens else str(i) for i in ids)

    notes = []
    lost = [i for i in ends if i not in llama_cpp_ends and 0 <= i < config.vocab_size]
    if lost:
        notes.append(
            f"llama.cpp will not stop at {shown(lost)}: GGUF has keys for three end tokens only "
            "(eos, eot, eom), and they are taken"
        )
    added = [i for i in llama_cpp_ends if i not in ends]
    if ends and added:
        notes.append(f"llama.cpp will also stop at {shown(added)}, which it knows by its text")
    notes += [
        f"generation_config.json: {name} {str(value)[:40]} cannot be used for sampling and is left out"
        for name, value in unusable_sampling(files).items()
    ]
    if not {"license", "languages"} & checkpoint.facts.keys():
        notes.append(
            "license and languages are left out: there is no README.md with them beside the weights"
        )
    return notes


def cast_rule(checkpoint: Checkpoint, dtype: str | None) -> CastRule:
    """What becomes of a tensor: for q8_0, a matrix is quantized and dequantized again."""
    if dtype != "q8_0":
        return cast

    def rule(name: str, values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        if values.ndim > 1 and dtype == _FLOAT32:
            return dequantized(name, values)
        return cast(name, values, dtype)

    return rule


def stored_bytes(spec: TensorSpec, dtype: str | None) -> int:
    """Bytes in the file of a tensor of `target_specs`."""
    block, block_bytes = GGML_QUANT_SIZES[_type(spec, dtype)]
    return spec.size // block * block_bytes


def write(checkpoint: Checkpoint, path: Path, progress: Callable[[int], None]) -> None:
    """Write `checkpoint`, whose tensors are those of `target_specs`, into the new file `path`.

    Raises:
        OSError: the disk is full or broken; also whatever `checkpoint.load` raises.
    """
    config, dtype = LlamaConfig.from_dict(checkpoint.config), checkpoint.dtype
    scaling, rope_freqs = rope_scaling(config)
    first_matrix = next(spec for spec in checkpoint.tensors if len(spec.shape) > 1)
    metadata = {
        **_description(checkpoint, default_name=path.stem),
        **hyperparameters(config),
        **scaling,
        "general.file_type": int(_FILE_TYPES[_type(first_matrix, dtype)]),
        **tokenizer_metadata(checkpoint.files, config),
        **sampling_metadata(checkpoint.files),
    }
    _write_header(path, metadata, checkpoint, rope_freqs)
    with path.open("ab") as file:
        _align(file)
        if rope_freqs is not None:
            file.write(rope_freqs.tobytes())
            _align(file)
        for spec in checkpoint.tensors:
            values = checkpoint.load(spec.name)
            is_q8_0 = _type(spec, dtype) == GGMLQuantizationType.Q8_0
            for rows in _row_groups(values, rotary_heads(spec.name, config)):
                data = quantized(rows) if is_q8_0 else rows
                progress(file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data))
            _align(file)


def _write_header(
    path: Path,
    metadata: dict[str, Any],
    checkpoint: Checkpoint,
    rope_freqs: np.ndarray | None,
) -> None:
    """Metadata and tensor table; the tensors follow in the order of the table."""
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        _add(writer, key, value)
    if rope_freqs is not None:
        writer.add_tensor_info(ROPE_FREQS, rope_freqs.shape, rope_freqs.dtype, rope_freqs.nbytes)
    for spec in checkpoint.tensors:
        writer.add_tensor_info(
            gguf_name(spec.name),
            spec.shape,
            spec.dtype,
            stored_bytes(spec, checkpoint.dtype),
            raw_dtype=_type(spec, checkpoint.dtype),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _description(checkpoint: Checkpoint, default_name: str) -> dict[str, Any]:
    """What the model is called and how it may be used, as far as the source says."""
    facts = checkpoint.facts
    metadata = {"general.type": "model", "general.name": facts.get("name", default_name)}
    for fact, key in (
        ("organization", "organization"),
        ("license", "license"),
        ("license_name", "license.name"),
        ("license_link", "license.link"),
        ("languages", "languages"),
    ):
        if fact in facts:
            metadata[f"general.{key}"] = facts[fact]
    metadata["general.size_label"] = size_label(checkpoint.parameters, 0, 0, 0)
    metadata["general.quantization_version"] = GGML_QUANT_VERSION
    return metadata


def _dtype(spec: TensorSpec, dtype: str | None) -> np.dtype[Any]:
    """What the reader returns of a tensor."""
    if len(spec.shape) == 1:
        return _FLOAT32
    if dtype == "q8_0":
        return _FLOAT32 if divides_into_blocks(spec.shape) else np.dtype(np.float16)
    target = spec.dtype if dtype is None else DTYPES[dtype]
    if target not in _TYPES:
        raise ValueError(
            f"tensor {spec.name} is {target}, expected --dtype float32, bfloat16, float16 or q8_0: "
            "GGUF's llama has no such matrices"
        )
    return target


def _type(spec: TensorSpec, dtype: str | None) -> GGMLQuantizationType:
    """How a tensor of `target_specs` is stored."""
    if dtype == "q8_0" and len(spec.shape) > 1 and spec.dtype == _FLOAT32:
        return GGMLQuantizationType.Q8_0
    return _TYPES[spec.dtype]


def _row_groups(values: np.ndarray, heads: int) -> Iterator[np.ndarray]:
    """`values` some rows at a time, those of `heads` in llama.cpp's order."""
    unit = len(values) // heads if heads else 1
    unit_bytes = max(1, values[:unit].nbytes)
    step = max(1, _CHUNK_BYTES // unit_bytes) * unit
    for start in range(0, len(values), step):
        rows = values[start : start + step]
        yield to_pairs(rows, len(rows) // unit if heads else 0)


def _align(file: BufferedWriter) -> None:
    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        element = _ELEMENT_TYPES[type(value[0])]
        writer.add_key_value(key, value, GGUFValueType.ARRAY, element)
    else:
        writer.add_key_value(key, value, _VALUE_TYPES[type(value)])
