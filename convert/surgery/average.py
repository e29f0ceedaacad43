"""`--average`: the weighted mean of several checkpoints of one model, whatever their formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from convert.checkpoint import Checkpoint
from convert.same_function import config_differences
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.formatting import summarize

_CHUNK = 2**22  # values added up at a time: bounds the temporaries


def averaged(checkpoints: Sequence[Checkpoint], weights: Sequence[float] | None) -> Checkpoint:
    """The mean of checkpoints, added up in float32, or float64 if one is, one of them in memory at a time.

    The config and the tokenizer are the first one's.

    Args:
        weights: one for each checkpoint; they are divided by their sum.

    Raises:
        ValueError: models that differ, or weights that do not belong to them.
    """
    shares = _shares(weights, len(checkpoints))
    first = checkpoints[0]
    shapes = {spec.name: spec.shape for spec in first.tensors}
    dtypes = {name: np.dtype(np.float32) for name in shapes}
    for spec in (spec for checkpoint in checkpoints for spec in checkpoint.tensors):
        if spec.dtype == np.float64:
            dtypes[spec.name] = spec.dtype
    for number, other in enumerate(checkpoints[1:], 2):
        if differences := config_differences(other.config, first.config):
            raise ValueError(f"average: checkpoint {number} has {'; '.join(differences)}")
        others = {spec.name: spec.shape for spec in other.tensors}
        problems = [
            f"{name}: found {_shown(others, name)}, expected {_shown(shapes, name)}"
            for name in sorted(shapes.keys() | others.keys())
            if shapes.get(name) != others.get(name)
        ]
        if problems:
            raise ValueError(summarize(f"average: checkpoint {number}", problems))

    def load(name: str) -> np.ndarray:
        total = np.zeros(math.prod(shapes[name]), dtypes[name])
        for share, checkpoint in zip(shares, checkpoints, strict=True):
            values = checkpoint.load(name).reshape(-1)
            for start in range(0, total.size, _CHUNK):
                chunk = slice(start, start + _CHUNK)
                with np.errstate(over="ignore"):  # checked by whoever writes the tensor
                    total[chunk] += share * values[chunk].astype(np.float64)
            del values  # before the next is read
        return total.reshape(shapes[name])

    return replace(
        first,
        format=f"the average of {len(checkpoints)} checkpoints",
        tensors=tuple(TensorSpec(s.name, dtypes[s.name], s.shape) for s in first.tensors),
        load=load,
        weight_files=tuple(file for each in checkpoints for file in each.weight_files),
    )


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise ValueError(
            f"weights: found {len(given)}, expected one for each of {count} checkpoints"
        )
    total = sum(given)
    if not all(map(math.isfinite, [*given, total])) or not total > 0:
        raise ValueError(f"weights: found {given}, expected numbers with a finite sum above 0")
    return [weight / total for weight in given]


def _shown(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "nothing"
