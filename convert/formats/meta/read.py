"""Meta's own checkpoints: `params.json` and `consolidated.NN.pth`, one file for each parallel piece.

What the format has no word for (the context, the ids of bos and eos) is written as a config.json beside,
which Meta's code does not look at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.casting import casts
from convert.checkpoint import DTYPES, Checkpoint, common_dtype, in_dtype, plain_bytes
from convert.companions import read_companions, require_inside
from convert.formats.huggingface import stored_facts
from convert.formats.meta.params import config_of, params_of
from convert.formats.meta.tensors import EMBEDDING, HEAD, Merged, merge, slots
from convert.formats.meta.tokenizer import hugging_face_files, metas_file
from convert.formats.meta.write import write
from convert.formats.torch_files import WHOLE_NOTE, TorchFile, open_torch_file, require_torch
from convert.model_card import card_facts
from convert.proof import other_function
from llama_jax.checkpoints.huggingface import ignored_notes
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.json_object import read_json_object
from llama_jax.formatting import report

__all__ = [
    "DTYPE_NAMES",
    "TITLE",
    "losses",
    "read",
    "recognises",
    "rule",
    "specs",
    "stored_bytes",
    "write",
]

TITLE = "Meta"
DTYPE_NAMES = tuple(DTYPES)
rule = casts
stored_bytes = plain_bytes
_PIECE = re.compile(r"consolidated\.(\d\d+)\.pth")
_IGNORED = "rope.freqs"  # a buffer of Llama 1 and 2; it follows from the params


def losses(checkpoint: Checkpoint) -> list[str]:
    """A tokenizer that Meta's code does not read."""
    if "tokenizer.json" not in checkpoint.files or metas_file(checkpoint.files) is not None:
        return []
    return ["no tokenizer.model can be made of this tokenizer.json, which comes along as it is"]


def recognises(path: Path) -> bool:
    """Whether it looks like one: a directory with such files."""
    return path.is_dir() and any(_PIECE.fullmatch(file.name) for file in path.iterdir())


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The Llama in a directory of Meta's; of the tensors, no more than needed to see a tied head.

    Without `tokenizer`, its files stay behind and faults in them do not matter.
    Raises ValueError, with every fault found, for tensors that are missing, unexpected or misshapen,
    pieces that do not go together, damaged files, links that leave the directory, params that
    contradict a config.json beside or are not of a Llama, and torch not installed.
    """
    for name in ("params.json", "config.json"):
        require_inside(path, name)
    params = read_json_object(path / "params.json")
    pieces = _open(path)
    beside = LlamaConfig.from_pretrained(path) if (path / "config.json").exists() else None
    try:
        config, notes = config_of(
            params, vocab_size=_vocabulary(pieces, params.get("dim")), tied=False, beside=beside
        )
    except ValueError as error:
        raise ValueError(f"{path / 'params.json'}: {error}") from None
    sources = _sources(path, pieces, config)
    head = sources.get("lm_head.weight")
    if head is None or ((beside is None or beside.tie_word_embeddings) and _tied(sources)):
        config = replace(config, tie_word_embeddings=True)
        if head is not None:
            del sources["lm_head.weight"]
            notes.append(f"{HEAD}, a copy of the embedding, is left out: the head is tied")
    if beside is not None:
        if faults := other_function(beside.to_dict(), config.to_dict()):
            raise ValueError(f"{path}: params.json and config.json differ: {'; '.join(faults)}")
        config = beside
    files = read_companions(path, tokenizer=tokenizer)
    made, ids = hugging_face_files(path, files, config)
    if beside is None:
        config = replace(config, **ids)
    notes += [
        f"{next(iter(piece.tensors.values())).path.name} {WHOLE_NOTE}"
        for piece in pieces
        if piece.whole
    ]
    facts, more = card_facts(path)
    notes += more
    notes += ignored_notes(config, path)
    specs = tuple(source.spec for source in sources.values())
    count = len(pieces)
    return Checkpoint(
        format=TITLE if count == 1 else f"{TITLE}, {count} pieces",
        config=config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        tensors=specs,
        load=lambda name: sources[name].read(),
        dtype=common_dtype(specs),
        files=files | made,
        facts=stored_facts([tensor for piece in pieces for tensor in piece.tensors.values()])
        | facts,
        notes=tuple(notes),
    )


def specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as they will be.

    Raises ValueError, naming the fields, for a model that Meta's format cannot express: params.json must
    mean the same function as the config.
    """
    require_torch()
    config = LlamaConfig.from_dict(checkpoint.config)
    tied = config.tie_word_embeddings
    try:
        found, _ = config_of(
            params_of(config), vocab_size=config.vocab_size, tied=tied, beside=None
        )
    except ValueError as error:
        raise ValueError(f"Meta's format cannot hold this model: {error}") from None
    if faults := other_function(found.to_dict(), checkpoint.config):
        raise ValueError(f"Meta's format cannot hold this model: {'; '.join(faults)}")
    return in_dtype(checkpoint, dtype)


def _open(path: Path) -> list[TorchFile]:
    """The files of all pieces, in order."""
    found = {
        int(match[1]): file
        for file in path.iterdir()
        if (match := _PIECE.fullmatch(file.name)) is not None
    }
    if sorted(found) != list(range(len(found))):
        absent = next(i for i in range(len(found)) if i not in found)
        raise ValueError(
            f"{path / f'consolidated.{absent:02d}.pth'}: not found, expected piece {absent}"
        )
    try:
        for _, file in sorted(found.items()):
            require_inside(path, file.name)
        return [open_torch_file(file) for _, file in sorted(found.items())]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _vocabulary(pieces: Sequence[TorchFile], dim: Any) -> int:
    """Rows of the embedding, of all pieces together."""
    embedding = pieces[0].tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2 or 0 in embedding.shape:
        return 1  # said to be missing or misshapen later
    rows, columns = embedding.shape
    return rows if columns != dim else rows * len(pieces)


def _sources(path: Path, pieces: Sequence[TorchFile], config: LlamaConfig) -> dict[str, Merged]:
    """Where every tensor of the model comes from, by Hugging Face name; without a head if there is none."""
    names = {name for piece in pieces for name in piece.tensors} - {_IGNORED}
    if config.num_hidden_layers > len(names):
        raise ValueError(
            f"{path}: found {len(names)} tensors, expected some for each of "
            f"n_layers={config.num_hidden_layers}"
        )
    table = slots(config)
    if HEAD not in names:
        del table["lm_head.weight"]
    faults: list[str] = []
    sources: dict[str, Merged] = {}
    for name, slot in table.items():
        merged, wrong = merge(name, slot, pieces)
        faults += wrong
        if merged is not None:
            sources[name] = merged
    known = {slot.name for slot in table.values()}
    faults += [f"{name}: unexpected" for name in sorted(names - known)]
    if faults:
        raise ValueError(report(str(path), faults))
    return sources


def _tied(sources: dict[str, Merged]) -> bool:
    """Whether the head is the embedding; it seldom takes more than a row to see that it is not."""
    head, embedding = sources["lm_head.weight"], sources["model.embed_tokens.weight"]
    if head.spec.dtype != embedding.spec.dtype:
        return False
    return bool(
        (head.first_row() == embedding.first_row()).all()
        and (head.read() == embedding.read()).all()
    )
