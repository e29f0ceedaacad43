"""Read LitGPT's checkpoints, the fused projections taken apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.companions import read_companions, require_inside
from convert.formats.directory import checkpoint_of, spec_of
from convert.formats.litgpt.config import FILE, OLD_FILE, config_of, read_fields
from convert.formats.litgpt.tensors import (
    EMBEDDING,
    FUSED,
    FUSED_BY_GROUP,
    HEAD,
    part_of,
    place_of,
)
from convert.formats.llama_tensors import tensor_shapes
from convert.formats.torch_files import OLD_FORM_NOTE, open_torch_file
from convert.same_function import config_differences
from llama_jax.checkpoints.match import same_values
from llama_jax.checkpoints.names import without_wrappers
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor
from llama_jax.config import LlamaConfig
from llama_jax.formatting import summarize

WEIGHTS = "lit_model.pth"


def recognizes(path: Path) -> bool:
    """Whether it looks like one: lit_model.pth, or its directory."""
    return path.name == WEIGHTS or (path.is_dir() and (path / WEIGHTS).exists())


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The Llama in a directory of LitGPT's.

    Rows of the vocabulary that LitGPT added as padding are left out where a config.json beside says how
    many there are without them.

    Args:
        tokenizer: whether to read it; if not, errors in it do not matter.

    Raises:
        ValueError: with every problem: tensors that are missing, unexpected or misshapen, a damaged file, a
            model_config.yaml that is not a Llama's or contradicts the config.json beside it, and torch not
            installed.
    """
    home = path if path.is_dir() else path.parent
    old = (home / OLD_FILE).exists() and not (home / FILE).exists()
    config_file = OLD_FILE if old else FILE
    for name in (WEIGHTS, config_file, "config.json"):
        require_inside(home, name)
    fields = read_fields(home / config_file)
    try:
        file = open_torch_file(home / WEIGHTS, tree=True)
    except ValueError as error:
        raise ValueError(f"{home}: {error}") from None
    stored, by_group = _model(file.tensors)
    config_json = LlamaConfig.from_pretrained(home) if (home / "config.json").exists() else None
    embedding = stored.get(EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and embedding.shape else 1
    try:
        config = config_of(fields, vocab_size=max(rows, 1), tied=False)
    except ValueError as error:
        raise ValueError(f"{home / config_file}: {error}") from None
    reader = _Reader(config, stored, by_group, file.load)
    _require_tensors(home, stored, config, by_group)
    may_be_tied = config_json is None or config_json.tie_word_embeddings
    notes = [f"{WEIGHTS} {OLD_FORM_NOTE}"] if file.in_memory else []
    if may_be_tied and (HEAD not in stored or _is_copy(stored, file.load)):
        config = replace(config, tie_word_embeddings=True)
        notes.append(f"{HEAD}, a copy of the embedding, is left out: the head is tied")
    if config_json is not None:
        if config_json.vocab_size < rows:
            notes.append(
                f"{rows - config_json.vocab_size} rows of padding are left out of the vocabulary"
            )
            config = replace(config, vocab_size=config_json.vocab_size)
        if differences := config_differences(config.to_dict(), config_json.to_dict()):
            raise ValueError(
                f"{home}: {config_file} and config.json differ: {'; '.join(differences)}"
            )
        config = config_json
    specs = [
        spec_of(name, replace(stored[place_of(name).name], shape=shape))
        for name, shape in tensor_shapes(config).items()
    ]
    shapes = {spec.name: spec.shape for spec in specs}
    return checkpoint_of(
        home,
        title="LitGPT" + (", projections by group" if by_group else ""),
        config=config,
        tensors=specs,
        load=lambda name: np.ascontiguousarray(reader.load(name)[: shapes[name][0]]),
        stored=stored.values(),
        weight_files=[home / WEIGHTS],
        files=read_companions(home, tokenizer=tokenizer),
        notes=notes,
    )


def _model(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], bool]:
    """The model's tensors by the present names, and whether its projections are fused by group."""
    stored: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        inner = without_wrappers(name).removeprefix("model.")
        if inner.startswith(("transformer.", "lm_head.")):
            stored[inner] = tensor
    by_group = any(f".{FUSED_BY_GROUP}." in name for name in stored)
    if by_group:
        stored = {
            name.replace(f".{FUSED_BY_GROUP}.", f".{FUSED}."): tensor
            for name, tensor in stored.items()
        }
    return stored, by_group


def _require_tensors(
    home: Path, stored: Mapping[str, StoredTensor], config: LlamaConfig, by_group: bool
) -> None:
    """Raise ValueError with every tensor that is missing, unexpected or misshapen."""
    if config.num_hidden_layers > len(stored):
        raise ValueError(
            f"{home / WEIGHTS}: found {len(stored)} tensors, expected some for each of "
            f"n_layer={config.num_hidden_layers}"
        )
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        place = place_of(name)
        rows = shape[0] + (0 if place.part is None else expected.get(place.name, (0,))[0])
        expected[place.name] = (rows, *shape[1:])
    problems = []
    for name, shape in expected.items():
        tensor = stored.get(name)
        shown = name.replace(FUSED, FUSED_BY_GROUP) if by_group else name
        if tensor is None:
            if name != HEAD:
                problems.append(f"{shown}: missing")
        elif tensor.dtype not in FLOAT_DTYPES:
            found = f"found dtype {tensor.dtype}, expected {', '.join(FLOAT_DTYPES)}"
            problems.append(f"{tensor.name}: {found}")
        elif tensor.shape != shape:
            problems.append(
                f"{tensor.name}: found shape {list(tensor.shape)}, expected {list(shape)}"
            )
    problems += [f"{stored[name].name}: unexpected" for name in stored.keys() - expected.keys()]
    if problems:
        raise ValueError(summarize(str(home / WEIGHTS), problems))


def _is_copy(stored: Mapping[str, StoredTensor], load: Callable[..., np.ndarray]) -> bool:
    """Whether the stored head is the embedding; a row is usually enough to see that it is not."""
    head, embedding = stored[HEAD], stored[EMBEDDING]
    if head.dtype != embedding.dtype:
        return False
    return all(
        same_values(load(head.name, rows=rows), load(embedding.name, rows=rows))
        for rows in (1, None)
    )


@dataclass
class _Reader:
    """Reads tensors, the last fused one being kept until its three parts have been read."""

    config: LlamaConfig
    tensors: Mapping[str, StoredTensor]
    by_group: bool
    load_stored: Callable[..., np.ndarray]
    kept: tuple[str, np.ndarray] | None = None

    def load(self, name: str) -> np.ndarray:
        place = place_of(name)
        stored = self.tensors[place.name].name
        if place.part is None:
            return self.load_stored(stored)
        kept = self.kept
        if kept is None or kept[0] != stored:
            kept = self.kept = None  # freed before the next one is read
            kept = self.kept = stored, self.load_stored(stored)
        if place.part == 2:
            self.kept = None
        return part_of(kept[1], place.part, self.config, by_group=self.by_group).copy()
