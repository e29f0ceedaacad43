"""Choosing the next token: filters of logits as free functions, and their composition.

Each filter equals the transformers class that its docstring names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.numerics.backend import target_platform
from llama_jax.numerics.scalars import is_integer, is_number, plain_number

# (input_ids [batch, slots], logits [batch, vocab], lengths [batch]) -> logits [batch, vocab]. The tokens
# of row r so far, prompt first, are input_ids[r, : lengths[r]], without the padding of the prompt; what
# follows is arbitrary. Shapes are static and may be larger than needed; lengths are traced. A row that has
# ended continues with padding tokens, as in transformers.
LogitsProcessor = Callable[[Array, Array, Array], Array]

_BLOCK = 128  # tokens whose largest score is looked for at a time


def temperature_filter(
    logits: Float[Array, "batch vocab"], temperature: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """`TemperatureLogitsWarper`: logits / temperature."""
    return logits / temperature


def top_k_filter(logits: Float[Array, "batch vocab"], top_k: int) -> Float[Array, "batch vocab"]:
    """`TopKLogitsWarper`: -inf below the `top_k`th largest (arXiv:1805.04833)."""
    smallest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def top_p_filter(
    logits: Float[Array, "batch vocab"], top_p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """`TopPLogitsWarper`: -inf outside the smallest set of probability `top_p` (arXiv:1904.09751)."""
    order = jnp.argsort(logits, axis=-1, stable=True)  # least probable first
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    removed = jnp.cumsum(probabilities, axis=-1) <= 1 - top_p
    removed = removed.at[:, -1].set(False)
    removed = jnp.put_along_axis(removed, order, removed, axis=-1, inplace=False)
    return jnp.where(removed, -jnp.inf, logits)


def min_p_filter(
    logits: Float[Array, "batch vocab"], min_p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """`MinPLogitsWarper`: -inf below `min_p` times the largest probability (arXiv:2407.01082)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    largest = jnp.max(probabilities, axis=-1, keepdims=True)
    is_first = jnp.arange(logits.shape[-1])[None] == jnp.argmax(probabilities, axis=-1)[:, None]
    return jnp.where((probabilities < min_p * largest) & ~is_first, -jnp.inf, logits)


def repetition_filter(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """`RepetitionPenaltyLogitsProcessor`: logits of seen tokens / `penalty`, negative ones * `penalty`.

    arXiv:1909.05858. `seen` marks the tokens of the prompt and of the continuation, without the padding,
    which transformers counts: here a padded row continues as it would alone.
    """
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def _static() -> Any:
    return field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None leaves out a filter. Numbers are traced: a new one does not recompile.

    Attributes:
        do_sample: sample, else take the likeliest token and ignore temperature, top_k, top_p and min_p.
        processors: applied after the repetition penalty and before the temperature, in transformers' order.
    """

    do_sample: bool = field(default=False, metadata={"static": True})
    temperature: Array | float | None = None
    top_k: int | None = _static()
    top_p: Array | float | None = None
    min_p: Array | float | None = None
    repetition_penalty: Array | float | None = None
    processors: tuple[LogitsProcessor, ...] = field(default=(), metadata={"static": True})


def checked(sampling: Sampling) -> Sampling:
    """`sampling` without filters that do nothing, its numbers as arrays.

    Raises:
        ValueError: a temperature or repetition penalty that is not positive, top_k below 0, top_p outside
            (0, 1], min_p outside [0, 1], or one of them not a number.
    """
    top_k = plain_number(sampling.top_k)
    if top_k is not None and (not is_integer(top_k) or top_k < 0):
        raise ValueError(f"top_k: found {top_k!r}, expected an integer of at least 0")
    numbers = {
        "temperature": ("a positive number", lambda x: 0 < x < float("inf"), 1.0),
        "top_p": ("a number in (0, 1]", lambda x: 0 < x <= 1, 1.0),
        "min_p": ("a number in [0, 1]", lambda x: 0 <= x <= 1, 0.0),
        "repetition_penalty": ("a positive number", lambda x: 0 < x < float("inf"), 1.0),
    }
    arrays: dict[str, Any] = {}
    for name, (expected, fits, neutral) in numbers.items():
        value = plain_number(getattr(sampling, name))
        if value is None:
            continue
        if not is_number(value) or not fits(value):
            raise ValueError(f"{name}: found {value!r}, expected {expected}")
        used = value != neutral and (sampling.do_sample or name == "repetition_penalty")
        arrays[name] = jnp.asarray(value, jnp.float32) if used else None
    return replace(sampling, top_k=top_k if top_k and sampling.do_sample else None, **arrays)


def filtered(
    sampling: Sampling,
    logits: Float[Array, "batch vocab"],
    input_ids: Int[Array, "batch slots"] | None,
    lengths: Int[Array, " batch"],
    seen: Bool[Array, "batch vocab"] | None,
) -> Float[Array, "batch vocab"]:
    """`logits` after every filter of `sampling`, in transformers' order.

    Args:
        input_ids, lengths: see `LogitsProcessor`; ids are None without processors.
        seen: the tokens that the repetition penalty applies to; None without one.
    """

    def number(value: Array | float) -> Array:
        return jnp.asarray(value, logits.dtype)

    if sampling.repetition_penalty is not None:
        assert seen is not None
        logits = repetition_filter(logits, seen, number(sampling.repetition_penalty))
    for process in sampling.processors:
        assert input_ids is not None
        logits = process(input_ids, logits, lengths)
    if sampling.temperature is not None:
        logits = temperature_filter(logits, number(sampling.temperature))
    if sampling.top_k is not None:
        logits = top_k_filter(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = top_p_filter(logits, number(sampling.top_p))
    if sampling.min_p is not None:
        logits = min_p_filter(logits, number(sampling.min_p))
    return logits


def choose(
    sampling: Sampling, scores: Float[Array, "batch vocab"], key: Key[Array, ""] | None
) -> Int[Array, " batch"]:
    """A token for each row: sampled, or the likeliest."""
    if sampling.do_sample:
        assert key is not None
        return jax.random.categorical(key, scores, axis=-1).astype(jnp.int32)
    return likeliest(scores)


def likeliest(scores: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The first of the largest scores; NaN is as large as infinity."""
    # `jnp.max` of a CPU can pass over NaN
    numbers = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    if target_platform() != "cpu":
        return jnp.argmax(numbers, axis=-1).astype(jnp.int32)
    # XLA's argmax has no vectors there, its maxima have
    rest = -scores.shape[1] % _BLOCK
    padded = jnp.pad(numbers, ((0, 0), (0, rest)), constant_values=-jnp.inf)
    blocks = padded.reshape(len(scores), -1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + jnp.argmax(within, axis=-1)).astype(jnp.int32)
