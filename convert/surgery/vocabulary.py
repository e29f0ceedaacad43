"""`--vocab-size`: rows of the vocabulary added or cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from convert.checkpoint import Checkpoint
from convert.companions import largest_token_id

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CHUNK = 2**12  # rows added up at a time


def with_vocab_size(checkpoint: Checkpoint, size: int, new_rows: str = "mean") -> Checkpoint:
    """The model with `size` rows in the embedding and the head.

    Args:
        new_rows: "mean" adds rows that are the mean of those that there are, added up in float64, so that a
            new token begins as an average one; "zero" adds zeros.

    Raises:
        ValueError: a size that the tokenizer, or bos, eos or pad, has ids beyond.
    """
    before = int(checkpoint.config["vocab_size"])
    if new_rows not in ("mean", "zero"):
        raise ValueError(f"new_rows: found {new_rows!r}, expected mean or zero")
    if size <= 0:
        raise ValueError(f"vocab_size: found {size}, expected a positive number")
    largest = largest_token_id(checkpoint.files)
    if largest is not None and largest >= size:
        raise ValueError(
            f"vocab_size: found {size}, but the tokenizer has ids up to {largest}; keep at least "
            f"{largest + 1} rows, or leave the tokenizer out"
        )
    for name in _IDS:
        value = checkpoint.config.get(name)
        ids = value if isinstance(value, list | tuple) else [value]
        if beyond := [i for i in ids if i is not None and i >= size]:
            raise ValueError(f"vocab_size: found {size}, but {name} is {beyond[0]}")

    def load(name: str) -> np.ndarray:
        values = checkpoint.load(name)
        if name not in _TABLES or len(values) == size:
            return values
        if size < len(values):
            return values[:size].copy()
        table = np.zeros((size, *values.shape[1:]), values.dtype)
        table[: len(values)] = values
        if new_rows == "mean":
            table[len(values) :] = _mean(values).astype(values.dtype)
        return table

    changed = f"the vocabulary is changed from {before} to {size} rows"
    if size > before:
        changed += f", the new ones {'zero' if new_rows == 'zero' else 'the mean of the others'}"
    return replace(
        checkpoint,
        config=dict(checkpoint.config) | {"vocab_size": size},
        tensors=tuple(
            replace(spec, shape=(size, *spec.shape[1:])) if spec.name in _TABLES else spec
            for spec in checkpoint.tensors
        ),
        load=load,
        notes=(*checkpoint.notes, *([changed] if size != before else [])),
    )


def _mean(values: np.ndarray) -> np.ndarray:
    total = np.zeros(values.shape[1:], np.float64)
    for start in range(0, len(values), _CHUNK):
        total += values[start : start + _CHUNK].astype(np.float64).sum(axis=0)
    return total / len(values)
