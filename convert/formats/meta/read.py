"""Read Meta's checkpoints, their shards merged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.companions import read_companions, require_inside
from convert.formats.directory import checkpoint_of
from convert.formats.meta.params import config_of
from convert.formats.meta.tensors import EMBEDDING, HEAD, MergedTensor, merge, meta_tensors
from convert.formats.meta.tokenizer import hugging_face_files
from convert.formats.torch_files import OLD_FORM_NOTE, TorchFile, open_torch_file
from convert.same_function import config_differences
from llama_jax.config import LlamaConfig
from llama_jax.files.json_object import read_json_object
from llama_jax.formatting import summarize

_SHARD = re.compile(r"consolidated\.(\d\d+)\.pth")
_IGNORED = "rope.freqs"  # a buffer of Llama 1 and 2; it follows from the params


def recognizes(path: Path) -> bool:
    """Whether it looks like one: a directory with consolidated.*.pth."""
    return path.is_dir() and any(_SHARD.fullmatch(file.name) for file in path.iterdir())


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The Llama in a directory of Meta's; no more is read than is needed to see whether the head is tied.

    Args:
        tokenizer: whether to read it; if not, errors in it do not matter.

    Raises:
        ValueError: with every problem: tensors that are missing, unexpected or misshapen, shards that do
            not go together, damaged files, links that leave the directory, a params.json that contradicts
            the config.json beside it or is not a Llama's, and torch not installed.
    """
    for name in ("params.json", "config.json"):
        require_inside(path, name)
    params = read_json_object(path / "params.json")
    files = _shard_files(path)
    shards = _open(path, files)
    config_json = LlamaConfig.from_pretrained(path) if (path / "config.json").exists() else None
    try:
        config, notes = config_of(
            params,
            vocab_size=_vocab_size(shards, params.get("dim")),
            tied=False,
            config_json=config_json,
        )
    except ValueError as error:
        raise ValueError(f"{path / 'params.json'}: {error}") from None
    tensors = _merged_tensors(path, shards, config)
    has_head = "lm_head.weight" in tensors
    may_be_tied = config_json is None or config_json.tie_word_embeddings
    if not has_head or (may_be_tied and _is_tied(tensors)):
        config = replace(config, tie_word_embeddings=True)
        if has_head:
            del tensors["lm_head.weight"]
            notes.append(f"{HEAD}, a copy of the embedding, is left out: the head is tied")
    if config_json is not None:
        if differences := config_differences(config.to_dict(), config_json.to_dict()):
            raise ValueError(
                f"{path}: params.json and config.json differ: {'; '.join(differences)}"
            )
        config = config_json
    companions = read_companions(path, tokenizer=tokenizer)
    made, special_ids = hugging_face_files(path, companions, config)
    if config_json is None:
        config = replace(config, **special_ids)
    notes += [
        f"{file.name} {OLD_FORM_NOTE}"
        for file, shard in zip(files, shards, strict=True)
        if shard.in_memory
    ]
    return checkpoint_of(
        path,
        title="Meta" if len(shards) == 1 else f"Meta, {len(shards)} shards",
        config=config,
        tensors=[tensor.spec for tensor in tensors.values()],
        load=lambda name: tensors[name].read(),
        stored=[tensor for shard in shards for tensor in shard.tensors.values()],
        weight_files=files,
        files=companions | made,
        notes=notes,
    )


def _shard_files(path: Path) -> list[Path]:
    """The files of all shards, in order."""
    files = {
        int(match[1]): file
        for file in path.iterdir()
        if (match := _SHARD.fullmatch(file.name)) is not None
    }
    for number in range(len(files)):
        if number not in files:
            missing = path / f"consolidated.{number:02d}.pth"
            raise ValueError(f"{missing}: not found, expected shards 0 to {max(files)}")
    for file in files.values():
        require_inside(path, file.name)
    return [files[number] for number in sorted(files)]


def _open(path: Path, files: Sequence[Path]) -> list[TorchFile]:
    try:
        return [open_torch_file(file) for file in files]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _vocab_size(shards: Sequence[TorchFile], dim: Any) -> int:
    """Rows of the embedding, of all shards together."""
    embedding = shards[0].tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2 or 0 in embedding.shape:
        return 1  # reported later as missing or misshapen
    rows, columns = embedding.shape
    return rows if columns != dim else rows * len(shards)


def _merged_tensors(
    path: Path, shards: Sequence[TorchFile], config: LlamaConfig
) -> dict[str, MergedTensor]:
    """Every tensor of the model by Hugging Face's names; without a head if there is none."""
    stored = {name for shard in shards for name in shard.tensors} - {_IGNORED}
    if config.num_hidden_layers > len(stored):
        raise ValueError(
            f"{path}: found {len(stored)} tensors, expected some for each of "
            f"n_layers={config.num_hidden_layers}"
        )
    expected = meta_tensors(config)
    if HEAD not in stored:
        del expected["lm_head.weight"]
    problems: list[str] = []
    tensors: dict[str, MergedTensor] = {}
    for name, tensor in expected.items():
        merged, its_problems = merge(name, tensor, shards)
        problems += its_problems
        if merged is not None:
            tensors[name] = merged
    known = {tensor.name for tensor in expected.values()}
    problems += [f"{name}: unexpected" for name in sorted(stored - known)]
    if problems:
        raise ValueError(summarize(str(path), problems))
    return tensors


def _is_tied(tensors: dict[str, MergedTensor]) -> bool:
    """Whether the head is the embedding; a row is usually enough to see that it is not."""
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    if head.spec.dtype != embedding.spec.dtype:
        return False
    return bool(
        (head.first_row() == embedding.first_row()).all()
        and (head.read() == embedding.read()).all()
    )
