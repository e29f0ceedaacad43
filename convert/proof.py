"""The proof of a conversion: what was written is read back, and every tensor is compared by its digest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from convert.record import Record, digest
from llama_jax.config import LlamaConfig
from llama_jax.numerics.rope import inverse_frequencies

_SAME = (  # with rope, what decides which function the weights compute
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_heads",
    "head_size",
    "hidden_act",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)
_ROUNDING = 1e-6  # relative: metadata may be float32, and a few of its roundings lie between


def read_back(
    read: Callable[..., Checkpoint],
    path: Path,
    config: Mapping[str, Any],
    records: Mapping[str, Record],
    progress: Callable[[int], None],
) -> None:
    """Compare the target at `path`, read as any source is, with what was to be written.

    Args:
        progress: is told the bytes just compared.

    Raises:
        ValueError: another model, other tensors, or a tensor of another shape, dtype or value.
    """
    found = read(path, tokenizer=False)
    if faults := other_function(config, found.config):
        raise ValueError(f"{path}: was read back with {'; '.join(faults)}")
    names = {spec.name for spec in found.tensors}
    if other := sorted(names ^ records.keys()):
        raise ValueError(f"{path}: was read back with other tensors: {', '.join(other[:5])}")
    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[str, Future[str]]] = []
        for name in [spec.name for spec in found.tensors]:
            values = found.load(name)
            if (str(values.dtype), values.shape) != records[name][:2]:
                raise ValueError(
                    f"{path}: tensor {name} was read back as {values.dtype}{list(values.shape)}, "
                    f"expected {records[name].dtype}{list(records[name].shape)}"
                )
            _require_equal(path, waiting, records)
            waiting.append((name, pool.submit(digest, values)))
            progress(values.nbytes)
        _require_equal(path, waiting, records)


def other_function(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What in two config.json makes them different functions, for people; [] if nothing does."""
    first, second = LlamaConfig.from_dict(one), LlamaConfig.from_dict(other)
    faults = [
        f"{name} {getattr(second, name)!r}, expected {getattr(first, name)!r}"
        for name in _SAME
        if getattr(first, name) != getattr(second, name)
    ]
    if not np.isclose(first.rms_norm_eps, second.rms_norm_eps, rtol=_ROUNDING, atol=0):
        faults.append(f"rms_norm_eps {second.rms_norm_eps}, expected {first.rms_norm_eps}")
    if not faults and not _same_rope(first, second):
        faults.append(f"rope_parameters {dict(second.rope)}, expected {dict(first.rope)}")
    return faults


def _same_rope(one: LlamaConfig, other: LlamaConfig) -> bool:
    """Whether positions are turned alike: formats spell the same frequencies in different ways."""
    context = one.max_position_embeddings
    for length in (1, context, 4 * context):
        (first, factor), (second, other_factor) = (
            inverse_frequencies(c.rope, c.head_size, c.max_position_embeddings, length)
            for c in (one, other)
        )
        if not np.allclose(first, second, rtol=_ROUNDING, atol=0) or not np.isclose(
            factor, other_factor, rtol=_ROUNDING
        ):
            return False
    return True


def _require_equal(
    path: Path, waiting: list[tuple[str, Future[str]]], records: Mapping[str, Record]
) -> None:
    while waiting:
        name, found = waiting.pop()
        if found.result() != records[name].sha256:
            raise ValueError(
                f"{path}: tensor {name} was read back with other values than were written: "
                "the disk, or this program, is at fault"
            )
