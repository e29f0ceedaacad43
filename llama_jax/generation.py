"""Greedy generation: prefill and decode compiled as one program over a static cache."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from llama_jax.cache import KVCache, init_cache
from llama_jax.config import LlamaConfig, require_tokens
from llama_jax.model import require_ids

# fields of a generation config that steer greedy decoding, and the values that leave it alone
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
}


@dataclass(frozen=True)
class GenerationConfig:
    """A `generation_config.json`: what ends and pads a generation, and fields kept to be written back."""

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], config: LlamaConfig) -> "GenerationConfig":
        """Read the ids from `fields`, or from the model's config where the file leaves them out."""
        eos = fields.get("eos_token_id")
        eos = config.eos_token_ids if eos is None else eos
        pad = fields.get("pad_token_id")
        pad = config.pad_token_id if pad is None else pad
        require_tokens("generation_config: eos_token_id", eos, several=True)
        require_tokens("generation_config: pad_token_id", pad, several=False)
        return cls((eos,) if isinstance(eos, int) else tuple(eos), pad, dict(fields))

    @property
    def unheeded(self) -> dict[str, Any]:
        """Fields that change greedy tokens in transformers and are not implemented here."""
        return {
            name: self.fields[name]
            for name, neutral in _NEUTRAL.items()
            if self.fields.get(name) not in (None, *neutral)
        }


class CausalModel(Protocol):
    """What generation needs of a model; it is called like `LlamaForCausalLM`."""

    config: LlamaConfig

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights, and of the cache."""

    @property
    def __call__(self) -> Callable[..., Any]:
        """Ids, mask, positions and cache in; `logits` and `cache` out."""


def generate(
    model: CausalModel,
    input_ids: Int[Array, "batch prompt"],
    attention_mask: Array | None,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int | None,
    cache_capacity: int | None = None,
) -> Int[Array, "batch total"]:
    """The prompt and the greedy continuation of every row, as `transformers.generate` returns them.

    A row ends with its first end-of-sequence token and is filled with `pad_token_id` (default: the first
    end-of-sequence id) until every row has ended or `max_new_tokens` are reached.

    Args:
        attention_mask: [batch, prompt], 0 for padding; positions count tokens only.
        cache_capacity: slots of the key/value cache; default: as many as are needed.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or a prompt that the cache cannot hold.

    Must be called outside jit: it compiles itself, and cuts the result to what was generated.

    Warns:
        UserWarning: padding on the right, after which a continuation makes little sense; positions
            beyond `max_position_embeddings`, which rope can compute but the model has not been
            trained on.
    """
    prompt = input_ids.shape[-1]
    if not isinstance(max_new_tokens, int):
        raise ValueError(f"max_new_tokens: found {max_new_tokens!r}, expected an integer")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: found {max_new_tokens}, expected at least 1")
    require_ids("input_ids", input_ids, model.config.vocab_size)
    # the last token is returned, never fed back
    needed = prompt + max_new_tokens - 1
    capacity = needed if cache_capacity is None else cache_capacity
    if needed > capacity:
        raise ValueError(
            f"prompt of {prompt} tokens and {max_new_tokens} new ones: expected a cache of at least "
            f"{needed} slots, found {capacity}"
        )
    limit = model.config.max_position_embeddings
    if prompt + max_new_tokens > limit:
        warnings.warn(
            f"{prompt} prompt tokens and {max_new_tokens} new ones go beyond "
            f"max_position_embeddings={limit}; the text may lose its sense",
            stacklevel=2,
        )
    is_token = jnp.ones(input_ids.shape, bool)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: found shape {attention_mask.shape}, expected {input_ids.shape}"
            )
        is_token = attention_mask.astype(bool)
        if not np.asarray(is_token)[:, -1].all():
            warnings.warn(
                "attention_mask: found padding after the prompt, expected it on the left",
                stacklevel=2,
            )
    if pad_token_id is None:
        pad_token_id = eos_token_ids[0] if eos_token_ids else 0
    tokens, steps = _greedy(
        model,
        jnp.asarray(input_ids, jnp.int32),
        is_token,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        capacity=capacity,
    )
    return tokens[:, : prompt + int(steps)]


@partial(jax.jit, static_argnames=("max_new_tokens", "eos_token_ids", "pad_token_id", "capacity"))
def _greedy(
    model: CausalModel,
    input_ids: Int[Array, "batch prompt"],
    is_token: Bool[Array, "batch prompt"],
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
    capacity: int,
) -> tuple[Int[Array, "batch total"], Int[Array, ""]]:
    batch, prompt = input_ids.shape
    ends = jnp.asarray(eos_token_ids, jnp.int32)
    counted = jnp.cumsum(is_token, axis=-1, dtype=jnp.int32)
    out = model(
        input_ids,
        attention_mask=is_token,
        position_ids=jnp.maximum(counted - 1, 0),
        cache=init_cache(model.config, batch, capacity, model.dtype),
        logits_to_keep=1,
    )
    tokens = jnp.full((batch, prompt + max_new_tokens), pad_token_id, jnp.int32)
    tokens = tokens.at[:, :prompt].set(input_ids)
    newest = jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32)
    tokens = tokens.at[:, prompt].set(newest)
    ended = jnp.isin(newest, ends)
    # (tokens, cache, newest token, its position, which rows have ended, how many were generated)
    state = (tokens, out.cache, newest, counted[:, -1], ended, jnp.ones((), jnp.int32))

    def wants_more(state: tuple[Array, KVCache, Array, Array, Array, Array]) -> Array:
        *_, ended, count = state
        return (count < max_new_tokens) & ~jnp.all(ended)

    def step(state: tuple[Array, KVCache, Array, Array, Array, Array]):
        tokens, cache, newest, position, ended, count = state
        out = model(newest[:, None], position_ids=position[:, None], cache=cache)
        newest = jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32)
        newest = jnp.where(ended, pad_token_id, newest)
        tokens = jax.lax.dynamic_update_slice(
            tokens, newest[:, None], (jnp.zeros((), jnp.int32), prompt + count)
        )
        return tokens, out.cache, newest, position + 1, ended | jnp.isin(newest, ends), count + 1

    tokens, *_, count = jax.lax.while_loop(wants_more, step, state)
    return tokens, count
