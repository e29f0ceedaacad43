"""`python -m convert diff A B`: which tensors differ, by how much, and what explains it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint import DTYPES, Checkpoint
from convert.formats import registry
from convert.formats.llama_tensors import rotary_heads, to_halves, to_pairs
from convert.record import checked
from convert.same_function import config_differences
from llama_jax.config import LlamaConfig
from llama_jax.files.paths import source_path

_CHUNK = 2**22  # values compared at a time: bounds the temporaries
_MOST_RANKS = 64  # a difference of more is not called low
_RANK_SHARE = 8  # nor one of more than this part of a matrix's sides
_SKETCH = 16  # columns beyond the rank, so that the largest singular values are found
_EXPLAINED = 0.02  # of a difference, what rounding may leave of it (relative norm)


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both."""

    name: str
    kind: str
    """What explains it: "cast to bfloat16", "transpose", "low rank, 8"; "other values" if nothing does."""
    largest: float | None
    """The largest difference; None where shapes differ or one is missing."""
    relative: float | None
    """The norm of the difference relative to that of the first tensor."""


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints beside each other."""

    config: list[str]
    """Fields of the config that make another function of the same weights, in words."""
    same: int
    """How many tensors are the same, bit for bit."""
    differences: list[Difference]


def diff(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> Comparison:
    """Compare two checkpoints of any formats, a tensor of each in memory at a time.

    Raises:
        ValueError: one of them is no checkpoint, or damaged.
    """
    paths = [source_path(path) for path in (one, other)]
    first, second = (checked(path, registry.read(path, tokenizer=False)) for path in paths)
    same, differences = 0, []
    for name in dict.fromkeys(spec.name for spec in (*first.tensors, *second.tensors)):
        with np.errstate(over="ignore", invalid="ignore"):  # of float64, whose squares overflow
            difference = _compare(name, first, second)
        if difference is None:
            same += 1
        else:
            differences.append(difference)
    return Comparison(config_differences(second.config, first.config), same, differences)


def _compare(name: str, first: Checkpoint, second: Checkpoint) -> Difference | None:
    present = [any(spec.name == name for spec in each.tensors) for each in (first, second)]
    if not all(present):
        return Difference(name, f"only in the {'first' if present[0] else 'second'}", None, None)
    a, b = first.load(name), second.load(name)
    if a.shape != b.shape:
        kind = f"shape {list(a.shape)} and {list(b.shape)}"
        if a.shape == b.shape[::-1] and _equal(a.T, b):
            kind = "transpose"
        elif a.shape[1:] == b.shape[1:] and _equal(a[: len(b)], b[: len(a)]):
            kind = f"{abs(len(b) - len(a))} rows {'more' if len(b) > len(a) else 'fewer'}"
        return Difference(name, kind, None, None)
    blocks = zip(_rows(a), _rows(b), strict=True)
    if a.dtype == b.dtype and all(old.tobytes() == new.tobytes() for old, new in blocks):
        return None
    largest, norm, error = 0.0, 0.0, 0.0
    for old, new in _chunks(a, b):
        delta = new - old
        largest = max(largest, float(np.abs(delta).max(initial=0)))
        norm, error = norm + float(old @ old), error + float(delta @ delta)
    relative = (error / norm) ** 0.5 if norm else (float("inf") if error else 0.0)
    heads = rotary_heads(name, LlamaConfig.from_dict(first.config))
    return Difference(name, _explained(a, b, heads), largest, relative)


def _explained(a: np.ndarray, b: np.ndarray, heads: int) -> str:
    """What was done to `a` to get `b`, the likeliest first."""
    if (kind := _cast(a, b)) is not None:
        return kind
    if _equal(a, b):
        return "signs of zeros"
    if heads and (_equal(to_halves(a, heads), b) or _equal(to_pairs(a, heads), b)):
        return "permutation of rows, of RoPE's pairs"
    if a.ndim == 2:
        if a.shape[0] == a.shape[1] and _equal(a.T, b):
            return "transpose"
        for axis, what in ((0, "rows"), (1, "columns")):
            if _permuted(a, b, axis):
                return f"permutation of {what}"
    elif a.ndim == 1 and _equal(np.sort(a), np.sort(b)):
        return "permutation"
    if (scale := _scale(a, b)) is not None:
        return f"scale, {scale:.6g}"
    if (rank := _rank(a, b)) is not None:
        return f"low rank, {rank}"
    return "other values"


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one shape hold the same numbers, whatever their dtypes."""
    return a.shape == b.shape and all(
        np.array_equal(old, new) for old, new in zip(_rows(a), _rows(b), strict=True)
    )


def _cast(a: np.ndarray, b: np.ndarray) -> str | None:
    """A change of dtype, or values that went through a narrower one."""
    if a.dtype != b.dtype:
        with np.errstate(over="ignore"):
            if _equal(a.astype(b.dtype), b):
                return f"cast to {b.dtype}"
            if _equal(b.astype(a.dtype), a):
                return f"cast from {a.dtype}, with more digits in {b.dtype}"
    for name, dtype in DTYPES.items():
        if dtype.itemsize < max(a.dtype.itemsize, b.dtype.itemsize):
            with np.errstate(over="ignore"):
                if _equal(a.astype(dtype), b):
                    return f"rounded to {name}"
                if _equal(b.astype(dtype), a):
                    return f"rounded to {name}, the first of them"
    return None


def _permuted(a: np.ndarray, b: np.ndarray, axis: int) -> bool:
    """Whether the rows of one, along `axis`, are those of the other in another order."""
    if a.dtype != b.dtype:
        return False
    digests = [
        sorted(hash(row.tobytes()) for row in np.moveaxis(values, axis, 0)) for values in (a, b)
    ]
    return digests[0] == digests[1]


def _scale(a: np.ndarray, b: np.ndarray) -> float | None:
    """The number that all values were multiplied with, up to rounding."""
    dot = norm = other = 0.0
    for old, new in _chunks(a, b):
        dot, norm, other = dot + float(old @ new), norm + float(old @ old), other + float(new @ new)
    if not norm or not other:
        return None
    scale = dot / norm
    left, error = max(other - dot * scale, 0.0), other - 2 * dot + norm
    return scale if left <= _EXPLAINED**2 * min(error, other) else None


def _rank(a: np.ndarray, b: np.ndarray) -> int | None:
    """The rank of a difference that is low, as a merged adapter's is; None if it is not.

    A random sketch finds the largest singular values without a decomposition of the matrix.
    """
    if a.ndim != 2:
        return None
    most = min(_MOST_RANKS, min(a.shape) // _RANK_SHARE)
    if not most:
        return None
    # by a power of two, which rounds nothing, so that no square overflows
    exponent = np.frexp(max(float(np.abs(values).max(initial=0)) for values in (a, b)))[1]
    old, new = (
        np.multiply(
            values, 2.0 ** -max(int(exponent), -100), dtype=np.result_type(values.dtype, np.float32)
        ).astype(np.float32, copy=False)
        for values in (a, b)
    )
    delta = new - old
    norm, rounding = (float(np.linalg.norm(values)) for values in (delta, new))
    # rounding to the dtype, which is of full rank: a uniform error of one unit in the last place
    rounding = rounding**2 * _unit(b) ** 2 / 12
    del old, new
    sketch = np.random.default_rng(0).standard_normal((a.shape[1], most + _SKETCH), np.float32)
    basis, _ = np.linalg.qr(delta @ (delta.T @ (delta @ sketch)) / max(norm, 1e-30) ** 2)
    values = np.linalg.svd(basis.T @ delta, compute_uv=False).astype(np.float64)
    left = norm**2 - np.cumsum(values[:most] ** 2)
    enough = np.flatnonzero(left <= _EXPLAINED**2 * norm**2 + rounding)
    return int(enough[0]) + 1 if enough.size and rounding < norm**2 / 4 else None


def _unit(values: np.ndarray) -> float:
    """Of the last place, relative to a power of two."""
    return float(ml_dtypes.finfo(values.dtype).eps)


def _rows(values: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks along the first axis."""
    step = max(1, _CHUNK // max(int(np.prod(values.shape[1:])), 1))
    for start in range(0, len(values), step):
        yield values[start : start + step]


def _chunks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both in float64, flat, block by block."""
    for old, new in zip(_rows(a), _rows(b), strict=True):
        yield old.astype(np.float64).reshape(-1), new.astype(np.float64).reshape(-1)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """For `--json`."""
    return {
        "config": comparison.config,
        "same": comparison.same,
        "differences": [
            {name: _finite(value) for name, value in vars(each).items()}
            for each in comparison.differences
        ],
    }


def _finite(value: Any) -> Any:
    """None in place of what JSON has no number for: a change relative to zeros."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
