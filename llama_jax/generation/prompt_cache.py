"""Keys and values of a prompt and its continuation that stay for the next prompt, as in a chat."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llama_jax.attention.cache import KVCache, grow_cache, init_cache, unstack_cache
from llama_jax.config import LlamaConfig
from llama_jax.inputs.lengths import padded_length
from llama_jax.text.incremental import common_length


class Earlier(NamedTuple):
    """What a prefill continues.

    Attributes:
        tokens: the first `cache.length` are in the cache; one column more than it has slots.
        cache: unstacked where decoding unstacks the layers.
    """

    tokens: Int[Array, "batch slots"]
    cache: KVCache


class PromptCache:
    """The key/value cache of one generation, for the next one.

    Pass the same one to each `LlamaForCausalLM.stream` of a conversation: what a prompt begins with like
    the last prompt and its continuation is not run again. It is for one model, and prompts without padding.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForCausalLM, PromptCache
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> model, kept = LlamaForCausalLM(config, rngs=nnx.Rngs(0)), PromptCache()
        >>> prompt = jnp.array([[5, 6, 7]])
        >>> answer = [*model.stream(prompt, max_new_tokens=4, eos_token_id=(), prompt_cache=kept)]
        >>> len(kept.tokens)  # the last new token has not been run
        6
    """

    def __init__(self) -> None:
        self._held: Earlier | None = None

    @property
    def tokens(self) -> list[int]:
        """The tokens whose keys and values are there."""
        held = self._held
        # an interrupted step may have given up its arrays without returning new ones
        if held is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(held)):
            return []
        return np.asarray(held.tokens)[0, : int(held.cache.length)].tolist()

    def keep(self, earlier: Earlier) -> None:
        """Replace what is there."""
        self._held = earlier

    def take(
        self,
        config: LlamaConfig,
        prompt: list[int],
        *,
        capacity: int | None,
        new: int,
        dtype: jnp.dtype,
        unstacked: bool,
    ) -> tuple[int, Earlier]:
        """How many tokens of the prompt need not be run, at least one fewer than all, and their cache.

        Args:
            capacity: of the cache; None for one that holds the prompt with `new` tokens after it, and what
                is run of it padded to `padded_length`.
        """
        known = _reusable(config, self.tokens, prompt)
        held, self._held = self._held, None
        cached = held.cache.capacity if held is not None else 0
        needed = max(len(prompt) + new - 1, known + padded_length(len(prompt) - known))
        # in powers of two, so that a conversation compiles few programs
        slots = capacity or max(cached, 1 << (needed - 1).bit_length())
        if not known or held is None or cached > slots or _dtype(held.cache) != dtype:
            cache = init_cache(config, 1, slots, dtype)
            empty = Earlier(
                jnp.zeros((1, slots + 1), jnp.int32), _unstack(cache) if unstacked else cache
            )
            return 0, empty
        if cached < slots:
            held = _grow(held, slots)
        return known, held._replace(
            cache=replace(held.cache, length=jax.device_put(np.int32(known)))
        )


def _reusable(config: LlamaConfig, cached: list[int], prompt: list[int]) -> int:
    """The tokens of the prompt whose keys are those that a fresh run would compute; never all."""
    rope = config.rope
    if rope["rope_type"] in ("dynamic", "longrope"):
        # beyond this length all frequencies are others, also those of the first tokens
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if max(len(cached), len(prompt)) > limit:
            return 0
    return min(common_length(cached, prompt), len(prompt) - 1)


def _dtype(cache: KVCache) -> jnp.dtype:
    return jax.tree.leaves(cache.keys)[0].dtype


_unstack = jax.jit(unstack_cache)


@partial(jax.jit, static_argnames="capacity")
def _grow(earlier: Earlier, capacity: int) -> Earlier:
    more = capacity + 1 - earlier.tokens.shape[1]
    return Earlier(
        jnp.pad(earlier.tokens, ((0, 0), (0, more))), grow_cache(earlier.cache, capacity)
    )
