"""Generation: a prefill and a loop of decoding steps, each compiled once per bucket of shapes."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.attention.cache import KVCache, init_cache, unstack_cache
from llama_jax.config import LlamaConfig
from llama_jax.generation.sampling import Sampling, checked, choose, filtered
from llama_jax.generation.unstacked import unstack_layers, wants_unstacked
from llama_jax.inputs.ids import require_ids
from llama_jax.inputs.keys import as_key
from llama_jax.numerics.matmul import working_dtype
from llama_jax.numerics.scalars import is_integer, plain_number


class CausalModel(Protocol):
    """What generation needs of a model; it is called like `LlamaForCausalLM`."""

    config: LlamaConfig

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights, and of the cache unless it is told otherwise."""

    @property
    def __call__(self) -> Callable[..., Any]:
        """Ids, mask, positions and cache in; `logits` and `cache` out."""


class GenerateOutput(NamedTuple):
    """sequences: prompt and continuation. scores: of each new token, the logits it was chosen by."""

    sequences: Int[Array, "batch total"]
    scores: Float[Array, "batch new vocab"]


class Ending(NamedTuple):
    """What ends a row, and what it is filled with from then on; traced."""

    eos_token_ids: Int[Array, " ends"]
    pad_token_id: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Between two steps.

    tokens: `length` columns of which are written. newest: the last of them, not yet in the cache, at
    `position`. seen: for the repetition penalty. row_tokens: those of each row without padding, position
    for position, for logits processors. scores: of the new tokens so far, where asked for.
    """

    tokens: Int[Array, "batch slots"]
    length: Int[Array, ""]
    newest: Int[Array, " batch"]
    position: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    cache: KVCache
    seen: Bool[Array, "batch vocab"] | None
    row_tokens: Int[Array, "batch slots"] | None
    scores: Float[Array, "batch new vocab"] | None


def generate(
    model: CausalModel,
    input_ids: Int[Array, "batch prompt"],
    attention_mask: Array | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int | None,
    key: Key[Array, ""] | None = None,
    cache_capacity: int | None = None,
    cache_dtype: DTypeLike | None = None,
    output_scores: bool = False,
) -> Int[Array, "batch total"] | GenerateOutput:
    """The prompt and the continuation of every row, as `transformers.generate` returns them.

    A row ends with its first end-of-sequence token and is filled with `pad_token_id` (default: the first
    end-of-sequence id) until every row has ended or `max_new_tokens` are reached.

    Must be called outside jit: it compiles itself, and cuts the result to what was generated. Prompts and
    caches are padded to buckets (`bucket`), within which nothing is compiled anew.

    Args:
        attention_mask: [batch, prompt], 0 for padding; positions count tokens only.
        key: what `sampling.do_sample` draws with, typed or raw; the same key gives the same tokens.
        cache_capacity: slots of the key/value cache; default: as many as are needed.
        cache_dtype: of keys and values; default: the model's. int8 keeps a scale per token and head.
        output_scores: return `GenerateOutput`.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, a mask of another shape, a prompt that
            the cache cannot hold, numbers that `sampling.checked` refuses, or no key to draw with.

    Warns:
        UserWarning: padding on the right, after which a continuation makes little sense; positions
            beyond `max_position_embeddings`, which rope can compute but the model has not been
            trained on.
    """
    begun = _begin(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        key=key,
        cache_capacity=cache_capacity,
        cache_dtype=cache_dtype,
        output_scores=output_scores,
    )
    state = begun.more(begun.state, int(max_new_tokens))
    length = int(state.length)
    sequences = state.tokens[:, begun.padding : length]
    if state.scores is None:
        return sequences
    new = length - begun.padding - input_ids.shape[1]
    return GenerateOutput(sequences, state.scores[:, :new])


def stream(
    model: CausalModel,
    input_ids: Int[Array, "batch prompt"],
    attention_mask: Array | None,
    **more: Any,
) -> Iterator[np.ndarray]:
    """The new tokens of `generate` as they come, int32 [batch] each; filled up where a row has ended."""
    begun = _begin(model, input_ids, attention_mask, output_scores=False, **more)
    state, prompt = begun.state, begun.padding + input_ids.shape[1]
    yield np.asarray(state.newest)
    for count in range(2, int(more["max_new_tokens"]) + 1):
        state = begun.more(state, count)
        if int(state.length) < prompt + count:
            return
        yield np.asarray(state.newest)


def bucket(size: int) -> int:
    """The next size that programs are compiled for: at most an eighth more, and 16 at least."""
    step = max(16, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


class _Begun(NamedTuple):
    """A generation after its first token; `more(state, count)` goes on to `count` new tokens."""

    state: _State
    padding: int
    more: Callable[[_State, int], _State]


def _begin(
    model: CausalModel,
    input_ids: Int[Array, "batch prompt"],
    attention_mask: Array | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int | None,
    key: Key[Array, ""] | None = None,
    cache_capacity: int | None = None,
    cache_dtype: DTypeLike | None = None,
    output_scores: bool,
) -> _Begun:
    is_token = _require_prompt(model.config, input_ids, attention_mask)
    max_new_tokens = plain_number(max_new_tokens)
    if not is_integer(max_new_tokens):
        raise ValueError(f"max_new_tokens: found {max_new_tokens!r}, expected an integer")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: found {max_new_tokens}, expected at least 1")
    cache_capacity, pad_token_id = plain_number(cache_capacity), plain_number(pad_token_id)
    if cache_capacity is not None and not is_integer(cache_capacity):
        raise ValueError(f"cache_capacity: found {cache_capacity!r}, expected an integer")
    if pad_token_id is not None and not is_integer(pad_token_id):
        raise ValueError(f"pad_token_id: found {pad_token_id!r}, expected an integer")
    sampling, key = checked(sampling), as_key("key", key)
    if sampling.do_sample and key is None:
        raise ValueError("key: found None, expected a jax.random.key to draw tokens with")
    prompt, vocab = input_ids.shape[1], model.config.vocab_size
    for end in eos_token_ids:
        if not is_integer(end) or not 0 <= end < vocab:
            raise ValueError(
                f"eos_token_id: found {end!r}, expected an integer from 0 to {vocab - 1}"
            )
    width, capacity = _shape(prompt, max_new_tokens, cache_capacity)
    limit = model.config.max_position_embeddings
    if prompt + max_new_tokens > limit:
        warnings.warn(
            f"{prompt} prompt tokens and {max_new_tokens} new ones go beyond "
            f"max_position_embeddings={limit}; the text may lose its sense",
            stacklevel=4,
        )
    if pad_token_id is None:
        pad_token_id = eos_token_ids[0] if eos_token_ids else 0
    ending = Ending(jnp.asarray(eos_token_ids, jnp.int32), jnp.asarray(pad_token_id, jnp.int32))
    padding = width - prompt
    unstacked = wants_unstacked(model)
    state = _prefill(
        model,
        jnp.pad(jnp.asarray(input_ids, jnp.int32), ((0, 0), (padding, 0))),
        jnp.pad(is_token, ((0, 0), (padding, 0))),
        sampling,
        ending,
        key,
        capacity=capacity,
        cache_dtype=jnp.dtype(model.dtype if cache_dtype is None else cache_dtype),
        unstacked=unstacked,
        output_scores=output_scores,
    )
    decoder = unstack_layers(model) if unstacked else model

    def more(state: _State, count: int) -> _State:
        end = jnp.asarray(width + count, jnp.int32)
        return _decode(decoder, state, end, width, sampling, ending, key)

    return _Begun(state, padding, more)


def _require_prompt(config: LlamaConfig, input_ids: Array, mask: Array | None) -> Array:
    """The mask as booleans."""
    require_ids("input_ids", input_ids, config.vocab_size)
    if mask is None:
        return jnp.ones(input_ids.shape, bool)
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: found shape {mask.shape}, expected {input_ids.shape}")
    is_token = jnp.asarray(mask).astype(bool)
    if not np.asarray(is_token)[:, -1].all():
        warnings.warn(
            "attention_mask: found padding after the prompt, expected it on the left",
            stacklevel=5,
        )
    return is_token


def _shape(prompt: int, new: int, cache_capacity: int | None) -> tuple[int, int]:
    """The padded length of the prompt, and the slots of the cache."""
    needed = prompt + new - 1  # the last token is returned, never fed back
    if cache_capacity is None:
        width = bucket(prompt)
        return width, bucket(width + new)
    if needed > cache_capacity:
        raise ValueError(
            f"prompt of {prompt} tokens and {new} new ones: expected a cache of at least "
            f"{needed} slots, found {cache_capacity}"
        )
    return min(bucket(prompt), prompt + cache_capacity - needed), cache_capacity


@partial(jax.jit, static_argnames=("capacity", "cache_dtype", "unstacked", "output_scores"))
def _prefill(
    model: CausalModel,
    input_ids: Int[Array, "batch width"],
    is_token: Bool[Array, "batch width"],
    sampling: Sampling,
    ending: Ending,
    key: Key[Array, ""] | None,
    *,
    capacity: int,
    cache_dtype: jnp.dtype,
    unstacked: bool,
    output_scores: bool,
) -> _State:
    """The prompt in the cache, and the first token."""
    batch, width = input_ids.shape
    counted = jnp.cumsum(is_token, axis=-1, dtype=jnp.int32)
    out = model(
        input_ids,
        attention_mask=is_token,
        position_ids=jnp.maximum(counted - 1, 0),
        cache=init_cache(model.config, batch, capacity, cache_dtype),
        logits_to_keep=1,
    )
    vocab, slots = model.config.vocab_size, capacity + 1
    seen = scores = None
    if sampling.repetition_penalty is not None:
        given = jnp.where(is_token, input_ids, vocab)
        rows = jnp.arange(batch)[:, None]
        seen = jnp.zeros((batch, vocab), bool).at[rows, given].set(True, mode="drop")
    row_tokens = None
    if sampling.processors:
        # tokens before padding, each in its place
        order = jnp.argsort(~is_token, axis=-1, stable=True)
        rows_only = jnp.take_along_axis(input_ids, order, axis=-1)
        row_tokens = jnp.pad(rows_only, ((0, 0), (0, slots - width)))
    if output_scores:
        scores = jnp.zeros((batch, slots - width, vocab), working_dtype(model.dtype))
    tokens = jnp.broadcast_to(ending.pad_token_id, (batch, slots)).at[:, :width].set(input_ids)
    state = _State(
        tokens=tokens,
        length=jnp.asarray(width, jnp.int32),
        newest=input_ids[:, -1],
        position=counted[:, -1] - 1,
        ended=jnp.zeros(batch, bool),
        cache=unstack_cache(out.cache) if unstacked else out.cache,
        seen=seen,
        row_tokens=row_tokens,
        scores=scores,
    )
    return _append(state, out.logits[:, -1], width, sampling, ending, key)


@partial(jax.jit, static_argnames="width", donate_argnames="state")
def _decode(
    model: CausalModel,
    state: _State,
    end: Int[Array, ""],
    width: int,
    sampling: Sampling,
    ending: Ending,
    key: Key[Array, ""] | None,
) -> _State:
    """Steps until `end` columns are written or every row has ended."""

    def wants_more(state: _State) -> Array:
        return (state.length < end) & ~jnp.all(state.ended)

    def step(state: _State) -> _State:
        out = model(state.newest[:, None], position_ids=state.position[:, None], cache=state.cache)
        state = replace(state, cache=out.cache)
        return _append(state, out.logits[:, -1], width, sampling, ending, key)

    return jax.lax.while_loop(wants_more, step, state)


def _append(
    state: _State,
    logits: Float[Array, "batch vocab"],
    width: int,
    sampling: Sampling,
    ending: Ending,
    key: Key[Array, ""] | None,
) -> _State:
    """The state with the token that `logits` give."""
    wide = logits.astype(working_dtype(logits.dtype))
    lengths = state.position + 1
    scores = filtered(sampling, wide, state.row_tokens, lengths, state.seen)
    count = state.length - width
    drawn_with = jax.random.fold_in(key, count) if sampling.do_sample and key is not None else None
    newest = jnp.where(state.ended, ending.pad_token_id, choose(sampling, scores, drawn_with))
    zero = jnp.zeros((), jnp.int32)
    kept, seen, row_tokens = state.scores, state.seen, state.row_tokens
    if kept is not None:
        kept = jax.lax.dynamic_update_slice(kept, scores[:, None], (zero, count, zero))
    if seen is not None:
        seen = seen | (jnp.arange(seen.shape[1], dtype=jnp.int32)[None] == newest[:, None])
    if row_tokens is not None:
        row_tokens = row_tokens.at[jnp.arange(len(newest)), lengths].set(newest)
    return replace(
        state,
        tokens=jax.lax.dynamic_update_slice(state.tokens, newest[:, None], (zero, state.length)),
        length=state.length + 1,
        newest=newest,
        position=state.position + 1,
        ended=state.ended | jnp.isin(newest, ending.eos_token_ids),
        seen=seen,
        row_tokens=row_tokens,
        scores=kept,
    )
