"""Read a GGUF Llama: its config in Hugging Face's terms, its tensors in Hugging Face's row order.

What llama.cpp's `convert_hf_to_gguf.py` does to a Llama on the way in is undone:

- the rows of the query and key projections are reordered (see `convert.formats.llama_tensors`);
- Llama 3's rope scaling is stored as a tensor, `rope_freqs.weight` (see `convert.formats.gguf.rope`);
- a tied output projection is left out;
- float32 metadata stands for decimals: 9.99999974738e-06 was 1e-05.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import LlamaFileType

from convert.checkpoint import DTYPES, Checkpoint
from convert.formats.gguf.config import read_config
from convert.formats.gguf.generation import generation_config
from convert.formats.gguf.header import GgufHeader, read_header
from convert.formats.gguf.keys import Keys
from convert.formats.gguf.rope import read_rope
from convert.formats.gguf.tensors import PLAIN_DTYPES, ROPE_FREQS, map_tensors, read_values
from convert.formats.gguf.tokenizer.read import TokenizerFiles, tokenizer_files
from convert.model_card import FILE as CARD
from convert.model_card import card_of
from llama_jax.config import LlamaConfig
from llama_jax.files.reading import open_file, read_bytes
from llama_jax.formatting import summarize


def recognizes(path: Path) -> bool:
    """Whether it looks like one: a file named *.gguf, or that begins with GGUF."""
    if not path.is_file():
        return False
    with open_file(path) as file:
        return path.suffix == ".gguf" or read_bytes(file, 4) == b"GGUF"


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The Llama in a GGUF file, or in its pieces; no tensor data is read until `load` is called.

    Args:
        tokenizer: whether to read it; if not, errors in it do not matter.

    Raises:
        ValueError: with every problem: a damaged file, another architecture, missing, unknown or misshapen
            tensors, types that the gguf library cannot dequantize, and hyperparameters that Hugging Face's
            Llama does not have.
    """
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: general.architecture is {architecture!r}, expected 'llama'")
    keys = Keys(header.metadata, "llama.")
    fields, notes = read_config(header, keys)
    _raise(path, keys.problems)
    sources, problems, more_notes = map_tensors(header, _parsed(path, fields))
    _raise(path, problems)
    notes += more_notes
    freqs = header.tensors.get(ROPE_FREQS)
    rope = read_rope(
        keys,
        None if freqs is None else read_values(freqs),
        head_dim=fields["head_dim"],
        context_length=fields["max_position_embeddings"],
    )
    _raise(path, keys.problems)
    config = _parsed(path, fields | {"rope_parameters": rope}).to_dict()

    generation = generation_config(header.metadata, config)
    files = {"generation_config.json": (json.dumps(generation, indent=2) + "\n").encode()}
    facts = _facts(header)
    if tokenizer:
        converted = _tokenizer(path, header.metadata, config)
        files |= {name: text.encode() for name, text in converted.files.items()}
        notes += converted.notes
    if (card := card_of(facts)) is not None:
        files[CARD] = card
    return Checkpoint(
        format=f"GGUF v{header.version}",
        config=config,
        tensors=tuple(source.spec for source in sources.values()),
        load=lambda name: sources[name].read(),
        dtype=_default_dtype(header),
        weight_files=tuple(dict.fromkeys(tensor.path for tensor in header.tensors.values())),
        files=files,
        facts=facts | (converted.facts if tokenizer else {}),
        notes=tuple(notes),
    )


def _parsed(path: Path, fields: dict[str, Any]) -> LlamaConfig:
    try:
        return LlamaConfig.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tokenizer(path: Path, metadata: dict[str, Any], config: dict[str, Any]) -> TokenizerFiles:
    try:
        return tokenizer_files(metadata, config)
    except ValueError as error:
        hint = "use --no-tokenizer to convert the weights alone"
        raise ValueError(f"{path}: {error}; {hint}") from None


def _default_dtype(header: GgufHeader) -> str:
    """The dtype of the matrices where they share one and are not quantized, else float32.

    Vectors do not count: converters store norms as F32 whatever the model was trained in.
    """
    types = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    dtype = np.dtype(np.float32)
    if len(types) == 1:
        dtype = PLAIN_DTYPES.get(types.pop(), dtype)
    return next(name for name, known in DTYPES.items() if known == dtype)


def _facts(header: GgufHeader) -> dict[str, Any]:
    """What `info` shows beside the config."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for tensor in header.tensors.values():
        count[tensor.type.name] += 1
        size[tensor.type.name] += tensor.nbytes
    facts: dict[str, Any] = {
        "stored": {name: {"tensors": count[name], "bytes": size[name]} for name in count},
        "file_bytes": header.file_size,
    }
    for key in ("name", "organization", "license", "license.name", "license.link", "size_label"):
        if isinstance(value := header.metadata.get(f"general.{key}"), str) and value:
            facts[key.replace(".", "_")] = value
    languages = header.metadata.get("general.languages")
    if isinstance(languages, list) and languages and all(type(text) is str for text in languages):
        facts["languages"] = languages
    file_type = header.metadata.get("general.file_type")
    if file_type in list(LlamaFileType):
        facts["file_type"] = LlamaFileType(file_type).name
    return facts


def _raise(path: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(summarize(str(path), problems))
