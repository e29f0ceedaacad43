"""`--adapter`: a checkpoint with a LoRA adapter merged into it, whatever the checkpoint's format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import DTYPES, Checkpoint
from convert.companions import read_companions
from convert.formats.llama_tensors import tensor_shapes
from llama_jax.checkpoints.adapter import (
    Adapter,
    adapted_config,
    compare_with_base,
    merge,
    open_adapter,
    source_of,
)
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.formatting import summarize


@dataclass
class Rounding:
    """What rounding the merged weights once costs, in sums of squares over all adapted tensors."""

    added: float = 0.0
    error: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the rounding errors, relative to that of what the adapter adds."""
        return (self.error / self.added) ** 0.5 if self.added else 0.0


@dataclass(frozen=True)
class _Merged:
    """Loads the tensors of the merged model."""

    checkpoint: Checkpoint
    adapter: Adapter
    base: LlamaConfig
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype[Any]]
    rounding: Rounding

    def load(self, name: str) -> np.ndarray:
        source = source_of(name, self.adapter, self.base)
        update = self.adapter.updates.get(name)
        if update is None:
            if source is None:  # of a bias that other layers have
                return np.zeros(self.shapes[name], self.dtypes[name])
            return self.checkpoint.load(source)
        before = None
        if source is not None and update.replacement is None:
            before = self.checkpoint.load(source)
        merged = merge(update, before)
        if before is not None:
            self._count(before, merged, self.dtypes[name])
        return merged

    def _count(self, before: np.ndarray, merged: np.ndarray, dtype: np.dtype[Any]) -> None:
        for old, new in zip(before, merged, strict=True):  # by rows, for memory
            added = new - old.astype(new.dtype)
            error = new.astype(dtype).astype(new.dtype) - new
            self.rounding.added += float(np.vdot(added, added))
            self.rounding.error += float(np.vdot(error, error))


def with_adapter(
    checkpoint: Checkpoint, directory: Path, dtype: str | None, *, tokenizer: bool = True
) -> tuple[Checkpoint, Rounding]:
    """The merged model; no values are read until its `load` is called.

    Adapted tensors are merged in float32 and rounded once, to what is written. The adapter's tokenizer
    stands in place of the base model's, if it has one.

    Args:
        dtype: to be written, a key of DTYPES; None: each tensor's own.
        tokenizer: whether to read the adapter's.

    Returns:
        And the cost of rounding, known once all tensors have been loaded.

    Raises:
        ValueError: an adapter that is damaged, cannot be merged, or is for another base model.
    """
    adapter = open_adapter(directory)
    base = LlamaConfig.from_dict(checkpoint.config)
    try:
        config = adapted_config(adapter, base)
        shapes = tensor_shapes(config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    if problems := compare_with_base(adapter, tensor_shapes(base), shapes):
        raise ValueError(summarize(f"{directory}: is for another base model", problems))
    stored = {spec.name: spec.dtype for spec in checkpoint.tensors}
    specs, written = [], {}
    for name, shape in shapes.items():
        source = source_of(name, adapter, base)
        own = stored[source] if source is not None else stored["model.norm.weight"]
        written[name] = own if dtype is None or dtype not in DTYPES else DTYPES[dtype]
        merged = np.dtype(np.float64 if own == np.float64 else np.float32)
        specs.append(TensorSpec(name, merged if name in adapter.updates else own, shape))
    rounding = Rounding()
    files = read_companions(directory, tokenizer=tokenizer)
    has_tokenizer = files.keys() & {"tokenizer.json", "tokenizer.model"}
    result = replace(
        checkpoint,
        format=f"{checkpoint.format} with a LoRA adapter",
        config=config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        tensors=tuple(specs),
        load=_Merged(checkpoint, adapter, base, shapes, written, rounding).load,
        files=_files(checkpoint, files) if has_tokenizer else checkpoint.files,
        digests={
            name: digest
            for name, digest in checkpoint.digests.items()
            if name not in adapter.updates and name in shapes
        },
        notes=(*checkpoint.notes, *_notes(adapter, base, config, bool(has_tokenizer))),
    )
    return result, rounding


def _files(checkpoint: Checkpoint, adapter: dict[str, bytes]) -> dict[str, bytes]:
    kept = {n: c for n, c in checkpoint.files.items() if n == "generation_config.json"}
    return kept | adapter


def _notes(adapter: Adapter, base: LlamaConfig, config: LlamaConfig, tokenizer: bool) -> list[str]:
    def count(fields: str) -> int:
        return sum(getattr(update, fields) is not None for update in adapter.updates.values())

    parts = {
        "adapted": count("a"),
        "of those by DoRA": count("magnitude"),
        "replaced": count("replacement"),
    }
    counted = ", ".join(f"{number} {kind}" for kind, number in parts.items() if number)
    notes = [f"adapter: tensors {counted}"]
    if config.vocab_size != base.vocab_size:
        notes.append(f"adapter: the vocabulary grows from {base.vocab_size} to {config.vocab_size}")
    if base.tie_word_embeddings and not config.tie_word_embeddings:
        notes.append("adapter: changes one of the tied embeddings alone, so the result is not tied")
    if tokenizer:
        notes.append("adapter: its tokenizer is taken")
    return notes
