"""Changes of the model itself on the way from one checkpoint to another, a tensor at a time.

Each is a function from a checkpoint to a checkpoint whose `load` does the work when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.formats import registry
from convert.record import checked
from convert.surgery.average import averaged
from convert.surgery.cast_only import with_cast
from convert.surgery.layers import with_layers
from convert.surgery.vocabulary import with_vocab_size
from llama_jax.files.paths import source_path

__all__ = ["Surgery", "averaged", "operate", "with_cast", "with_layers", "with_vocab_size"]


@dataclass(frozen=True)
class Surgery:
    """What to change.

    Example:
        convert("model", "half", surgery=Surgery(layers="0-15"))
    """

    average: Sequence[str | os.PathLike[str]] = ()
    """Checkpoints of the same model, of any formats, to average with the source."""
    weights: Sequence[float] | None = None
    """Of the source and those; by default all count alike."""
    layers: str | None = None
    """Layers to keep, as in "0-15" or "0-3,8,12-15"."""
    vocab_size: int | None = None
    """Rows of the vocabulary: more are added, fewer are cut."""
    new_rows: str = "mean"
    """What added rows are: the mean of those that there are, or zero."""

    cast_only: str | None = None
    """A regular expression: only tensors in whose names it is found are cast to the dtype to write."""

    def __bool__(self) -> bool:
        """Whether anything is to be changed."""
        chosen = (self.weights, self.layers, self.vocab_size, self.cast_only)
        return bool(self.average) or any(value is not None for value in chosen)


def operate(
    source: Path, checkpoint: Checkpoint, surgery: Surgery, dtype: str | None
) -> Checkpoint:
    """The changed model: averaged, then without layers, then with another vocabulary.

    Args:
        source: where `checkpoint` is.
        dtype: the one that was asked for.

    Raises:
        ValueError: something that is not in the model, or that its tokenizer does not go with.
    """
    checkpoint = checked(source, checkpoint)
    if surgery.weights is not None and not surgery.average:
        raise ValueError("weights: of what? give the checkpoints to average with as well (average)")
    if surgery.average:
        paths = [source_path(path) for path in surgery.average]
        others = [checked(path, registry.read(path, tokenizer=False)) for path in paths]
        checkpoint = averaged([checkpoint, *others], surgery.weights)
    if surgery.layers is not None:
        checkpoint = with_layers(checkpoint, surgery.layers)
    if surgery.vocab_size is not None:
        checkpoint = with_vocab_size(checkpoint, surgery.vocab_size, surgery.new_rows)
    if surgery.cast_only is not None:
        if dtype is None:
            raise ValueError("cast_only: needs a dtype to cast to")
        checkpoint = with_cast(checkpoint, surgery.cast_only, dtype)
    return checkpoint
