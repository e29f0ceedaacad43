"""What formats share that are a directory of weights beside Hugging Face's config.json and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint, common_dtype
from convert.companions import write_companions
from convert.model_card import card_facts
from llama_jax.checkpoints.huggingface import ignored_notes
from llama_jax.checkpoints.match import match_checkpoint
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.checkpoints.weight_files import ReadRows, StoredWeights
from llama_jax.config import LlamaConfig
from llama_jax.files.staging import write_text
from llama_jax.formatting import summarize
from llama_jax.models.causal_lm import LlamaForCausalLM


def model_tensors(
    path: Path, config: LlamaConfig, weights: StoredWeights, rows: ReadRows
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensors that make up the model, by Hugging Face's names in the files' order; and notes.

    Args:
        weights: all that is stored, under names that may have a wrapper's prefix.
        rows: reads part of a tensor, to compare a tied head with the embedding.

    Raises:
        ValueError: with every problem: tensors that are missing, unexpected or misshapen.
    """
    match = match_checkpoint(LlamaForCausalLM, config, weights, path, "float32", rows)
    if match.problems:
        raise ValueError(summarize(str(path), match.problems))
    notes = []
    if match.wrappers:
        notes.append(f"{match.wrappers} is removed from the tensors' names")
    if match.tied_copy is not None:
        notes.append("lm_head.weight, a copy of the embedding, is left out: the head is tied")
    tensors = {name: match.tensors[name] for name in match.table}
    in_order = sorted(tensors.items(), key=lambda item: (item[1].path, item[1].offset))
    return dict(in_order), notes


def checkpoint_of(
    directory: Path,
    *,
    title: str,
    config: LlamaConfig,
    tensors: Sequence[TensorSpec],
    load: Callable[[str], np.ndarray],
    stored: Iterable[StoredTensor],
    weight_files: Iterable[Path],
    files: Mapping[str, bytes],
    notes: Iterable[str],
) -> Checkpoint:
    """The checkpoint whose config.json, model card and tokenizer are in `directory`.

    Args:
        title: of the format, for people.
        stored: the tensors as they are in the files; for `info`.
        weight_files: whose sizes `info` adds up.
        files: see `Checkpoint.files`.
    """
    card, card_notes = card_facts(directory)
    unique_files = tuple(dict.fromkeys(weight_files))
    return Checkpoint(
        format=title,
        config=config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        tensors=tuple(tensors),
        load=load,
        dtype=common_dtype(tensors),
        weight_files=unique_files,
        files=files,
        facts=_stored_facts(stored, unique_files) | card,
        notes=(*notes, *ignored_notes(config, directory), *card_notes),
    )


def spec_of(name: str, tensor: StoredTensor) -> TensorSpec:
    """A stored tensor as `Checkpoint.load` returns it, under the model's name."""
    return TensorSpec(name, FLOAT_DTYPES[tensor.dtype], tensor.shape)


def rows_by_loading(load: Callable[[StoredTensor], np.ndarray]) -> ReadRows:
    """What reads rows of tensors that can only be loaded complete; each is loaded once and kept."""
    loaded: dict[str, np.ndarray] = {}

    def rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        if tensor.name not in loaded:
            loaded[tensor.name] = load(tensor)
        return loaded[tensor.name][start:stop]

    return rows


def write_config_and_companions(
    checkpoint: Checkpoint,
    directory: Path,
    files: Mapping[str, bytes] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and the files beside it.

    Args:
        files: to be written in place of the checkpoint's own.
        fields: further ones of config.json.
    """
    config: dict[str, Any] = dict(checkpoint.config)
    if (dtype := common_dtype(checkpoint.tensors)) is not None:
        config |= {"torch_dtype": dtype, "dtype": dtype}  # transformers 4 and 5 read one each
    config |= {name: value for name, value in (fields or {}).items() if value is not None}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    write_text(directory / "config.json", text + "\n")
    write_companions(directory, checkpoint.files if files is None else files)


def _stored_facts(stored: Iterable[StoredTensor], files: Iterable[Path]) -> dict[str, Any]:
    """How many tensors of each dtype there are, and how many bytes."""
    sizes: dict[str, dict[str, int]] = {}
    for tensor in stored:
        entry = sizes.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return {"stored": sizes, "file_bytes": sum(file.stat().st_size for file in files)}
