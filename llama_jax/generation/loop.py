"""Generation: a prefill and a loop of decoding steps, compiled once per bucket of shapes."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Thread
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.attention.cache import KVCache, init_cache, stack_cache, unstack_cache
from llama_jax.config import LlamaConfig
from llama_jax.generation.prompt_cache import Earlier, PromptCache
from llama_jax.generation.sampling import Sampling, checked, choose, filtered
from llama_jax.generation.unstacked import can_unstack, unstack_layers
from llama_jax.inputs.ids import require_ids
from llama_jax.inputs.keys import as_key
from llama_jax.inputs.lengths import bucket, padded_length
from llama_jax.numerics.matmul import working_dtype
from llama_jax.numerics.scalars import is_integer, plain_number

Prompt = Int[Array, "batch prompt"] | Int[np.ndarray, "batch prompt"]


class CausalModel(Protocol):
    """What generation needs of a model, which is called like `LlamaForCausalLM`."""

    config: LlamaConfig

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights, and by default of the cache."""

    @property
    def __call__(self) -> Callable[..., Any]:
        """Takes ids, mask, positions and cache; returns `logits` and `cache`."""


class GenerateOutput(NamedTuple):
    """What `generate` returns with `output_scores`.

    Attributes:
        sequences: prompts and continuations.
        scores: for each new token the logits that it was chosen from, after all filters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
        >>> out = model.generate(
        ...     jnp.array([[5, 6]]), max_new_tokens=3, eos_token_id=(), output_scores=True
        ... )
        >>> out.sequences.shape, out.scores.shape
        ((1, 5), (1, 3, 32))
    """

    sequences: Int[Array, "batch total"]
    scores: Float[Array, "batch new vocab"]


class Ending(NamedTuple):
    """The tokens that end a row, and the one that fills it from then on; traced."""

    eos_token_ids: Int[Array, " ends"] | Int[np.ndarray, " ends"]
    pad_token_id: Int[Array, ""] | Int[np.ndarray, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Between two decoding steps.

    tokens: the first `length` columns are written. newest: the last of them, at `position`, not yet in the
    cache. seen: the tokens of each row, for the repetition penalty. row_tokens: the tokens of each row by
    position, without padding, for logits processors. scores: of the new tokens so far, if requested.
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


class Request(NamedTuple):
    """What to generate, see `LlamaForCausalLM.generate`."""

    max_new_tokens: int
    sampling: Sampling
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    key: Key[Array, ""] | None = None
    cache_capacity: int | None = None
    cache_dtype: DTypeLike | None = None
    output_scores: bool = False


def generate(
    model: CausalModel,
    input_ids: Prompt,
    attention_mask: Array | np.ndarray | None,
    request: Request,
) -> Int[Array, "batch total"] | GenerateOutput:
    """The prompt and the continuation of every row, as `LlamaForCausalLM.generate` returns them.

    It cannot be called under jit: it compiles its own programs, and cuts the result to what was generated.
    Prompts and caches are padded to buckets (`bucket`), within which nothing is compiled again.
    """
    started = _start(model, input_ids, attention_mask, request)
    state = started.continue_to(started.state, int(request.max_new_tokens))
    length = int(state.length)
    sequences = state.tokens[:, :length]
    if state.scores is None:
        return sequences
    return GenerateOutput(sequences, state.scores[:, : length - input_ids.shape[1]])


def stream(
    model: CausalModel,
    input_ids: Prompt,
    attention_mask: Array | np.ndarray | None,
    request: Request,
    prompt_cache: PromptCache | None = None,
) -> Iterator[np.ndarray]:
    """The new tokens of `generate` as they come, int32 [batch]; padding in rows that have ended."""
    started = _start(model, input_ids, attention_mask, request, prompt_cache)
    state, prompt = started.state, input_ids.shape[1]
    # the prompt is still computed, and its first token is worth showing before the next can be computed
    # not a daemon: Python ends badly while one of those is in XLA
    compiling = Thread(target=started.compile, name="compile the decoding step")
    if request.max_new_tokens > 1:
        compiling.start()
    for count in range(1, int(request.max_new_tokens) + 1):
        if count == 2:
            compiling.join()
        if count > 1:
            state = started.continue_to(state, count)
        if int(state.length) < prompt + count:
            return
        if prompt_cache is not None:
            prompt_cache.keep(Earlier(state.tokens, state.cache))
        yield np.asarray(state.newest)


class _Started(NamedTuple):
    """A generation after its first token.

    continue_to: `continue_to(state, count)` runs it to `count` new tokens.
    compile: compiles for that, or reads the program from the cache of compiled programs.
    """

    state: _State
    continue_to: Callable[[_State, int], _State]
    compile: Callable[[], None]


def _start(
    model: CausalModel,
    input_ids: Prompt,
    attention_mask: Array | np.ndarray | None,
    request: Request,
    prompt_cache: PromptCache | None = None,
) -> _Started:
    is_token = _require_prompt(model.config, input_ids, attention_mask)
    request = _checked_request(request, model.config)
    prompt, new = input_ids.shape[1], request.max_new_tokens
    limit = model.config.max_position_embeddings
    if prompt + new > limit:
        warnings.warn(
            f"{prompt} prompt tokens and {new} new ones exceed max_position_embeddings={limit}; "
            "output quality may degrade",
            stacklevel=4,
        )
    pad_token_id = request.pad_token_id
    if pad_token_id is None:
        pad_token_id = request.eos_token_ids[0] if request.eos_token_ids else 0
    # in numpy, as lengths and prompts below: JAX would compile a program for each new shape
    ending = Ending(np.asarray(request.eos_token_ids, np.int32), np.asarray(pad_token_id, np.int32))
    sampling, key = request.sampling, request.key
    cache_dtype = jnp.dtype(model.dtype if request.cache_dtype is None else request.cache_dtype)
    unstacked = can_unstack(model)
    width, capacity = _bucketed(prompt, new, request.cache_capacity)
    ids = np.asarray(input_ids).astype(np.int32)
    known, earlier = 0, None
    if prompt_cache is not None:
        if len(input_ids) != 1 or not is_token.all():
            raise ValueError("prompt_cache: it is for one prompt without padding")
        known, earlier = prompt_cache.take(
            model.config,
            ids[0].tolist(),
            capacity=request.cache_capacity,
            new=new,
            dtype=cache_dtype,
            unstacked=unstacked,
        )
        width = min(padded_length(prompt - known), earlier.cache.capacity - known)
    padding = ((0, 0), (0, width - (prompt - known)))
    # traced: prompts of all lengths in a bucket share a program
    begin = np.asarray(prompt, np.int32)
    state = _prefill(
        model,
        np.pad(ids[:, known:], padding),
        np.pad(is_token[:, known:], padding),
        begin,
        earlier,
        sampling,
        ending,
        key,
        capacity=None if earlier else capacity,
        cache_dtype=cache_dtype,
        unstacked=unstacked,
        output_scores=request.output_scores,
    )
    decoder = unstack_layers(model) if unstacked else model

    def continue_to(state: _State, count: int) -> _State:
        end = np.asarray(prompt + count, np.int32)
        return _decode(decoder, state, end, begin, sampling, ending, key)

    settings = _settings()

    def compile_decode() -> None:
        if _settings() != settings:
            return  # another thread does not have those of a `with`, and would compile another program
        # what fails here fails again, where it is reported, in `continue_to`
        with suppress(Exception):
            _decode.lower(decoder, state, begin, begin, sampling, ending, key).compile()

    return _Started(state, continue_to, compile_decode)


def _settings() -> tuple[Any, ...]:
    """What programs depend on and a `with` can set."""
    options = ("enable_x64", "default_matmul_precision", "numpy_dtype_promotion", "default_device")
    mesh = jax.sharding.get_abstract_mesh()
    return mesh, *(getattr(jax.config, f"jax_{option}") for option in options)


def _checked_request(request: Request, config: LlamaConfig) -> Request:
    """The request with plain numbers, checked sampling and a typed key.

    Raises:
        ValueError: as `LlamaForCausalLM.generate`.
    """
    new = plain_number(request.max_new_tokens)
    if not is_integer(new):
        raise ValueError(f"max_new_tokens: found {new!r}, expected an integer")
    if new < 1:
        raise ValueError(f"max_new_tokens: found {new}, expected at least 1")
    cache_capacity = plain_number(request.cache_capacity)
    if cache_capacity is not None and not is_integer(cache_capacity):
        raise ValueError(f"cache_capacity: found {cache_capacity!r}, expected an integer")
    pad_token_id = plain_number(request.pad_token_id)
    if pad_token_id is not None and not is_integer(pad_token_id):
        raise ValueError(f"pad_token_id: found {pad_token_id!r}, expected an integer")
    sampling, key = checked(request.sampling), as_key("key", request.key)
    if sampling.do_sample and key is None:
        raise ValueError("key: found None, expected a jax.random.key to sample with")
    for token in request.eos_token_ids:
        if not is_integer(token) or not 0 <= token < config.vocab_size:
            raise ValueError(
                f"eos_token_id: found {token!r}, expected an integer from 0 to "
                f"{config.vocab_size - 1}"
            )
    return request._replace(
        max_new_tokens=new,
        sampling=sampling,
        pad_token_id=pad_token_id,
        key=key,
        cache_capacity=cache_capacity,
    )


def _require_prompt(
    config: LlamaConfig, input_ids: Prompt, mask: Array | np.ndarray | None
) -> np.ndarray:
    """The mask as booleans."""
    require_ids("input_ids", input_ids, config.vocab_size)
    if mask is None:
        return np.ones(input_ids.shape, bool)
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: found shape {mask.shape}, expected {input_ids.shape}")
    is_token = np.asarray(mask).astype(bool)
    if not is_token[:, -1].all():
        warnings.warn(
            "attention_mask: padding after the prompt; pad prompts on the left",
            stacklevel=5,
        )
    return is_token


def _bucketed(prompt: int, new: int, cache_capacity: int | None) -> tuple[int, int]:
    """The padded length of the prompt and the capacity of the cache."""
    needed = prompt + new - 1  # the last token is returned, never fed back
    if cache_capacity is None:
        width = bucket(prompt)
        return width, bucket(width + new)
    if needed > cache_capacity:
        raise ValueError(
            f"cache_capacity: found {cache_capacity}, expected at least {needed} for {prompt} prompt "
            f"tokens and {new} new ones"
        )
    return min(bucket(prompt), prompt + cache_capacity - needed), cache_capacity


@partial(
    jax.jit,
    static_argnames=("capacity", "cache_dtype", "unstacked", "output_scores"),
    donate_argnames="earlier",
)
def _prefill(
    model: CausalModel,
    input_ids: Int[Array, "batch width"],
    is_token: Bool[Array, "batch width"],
    end: Int[Array, ""],
    earlier: Earlier | None,
    sampling: Sampling,
    ending: Ending,
    key: Key[Array, ""] | None,
    *,
    capacity: int | None,
    cache_dtype: jnp.dtype,
    unstacked: bool,
    output_scores: bool,
) -> _State:
    """Run the prompt and choose the first token.

    Args:
        input_ids: of the prompt what is not in `earlier`, padded on the right.
        end: the length of the complete prompt.
        capacity: of a new cache, where there is no earlier one.
    """
    batch, width = input_ids.shape
    zero = jnp.zeros((), jnp.int32)
    if earlier is None:
        assert capacity is not None
        cache = init_cache(model.config, batch, capacity, cache_dtype)
        with jax.ensure_compile_time_eval():  # not traced, so that the model sees it is new
            cache = replace(cache, length=jax.device_put(np.zeros((), np.int32)))
        tokens, start = jnp.broadcast_to(ending.pad_token_id, (batch, capacity + 1)), zero
        before: Int[Array, "batch 1"] | int = 0
    else:
        cache = stack_cache(earlier.cache) if unstacked else earlier.cache
        tokens, start = earlier.tokens, cache.length
        before = start[None, None]  # one row without padding
    counted = before + jnp.cumsum(is_token, axis=-1, dtype=jnp.int32)
    out = model(
        input_ids,
        attention_mask=is_token,
        position_ids=jnp.maximum(counted - 1, 0),
        cache=cache,
        logits_to_keep=(end - start - 1)[None],
    )
    # the first decoding step writes over the padding
    cache = replace(out.cache, length=end)
    tokens = jax.lax.dynamic_update_slice(tokens, input_ids, (zero, start))
    vocab, slots = model.config.vocab_size, tokens.shape[1]
    in_prompt = cache.is_token & (jnp.arange(cache.capacity, dtype=jnp.int32) < end)[None]
    ids = tokens[:, : cache.capacity]
    seen = scores = None
    if sampling.repetition_penalty is not None:
        without_padding = jnp.where(in_prompt, ids, vocab)  # out of range: dropped
        rows = jnp.arange(batch)[:, None]
        seen = jnp.zeros((batch, vocab), bool).at[rows, without_padding].set(True, mode="drop")
    row_tokens = None
    if sampling.processors:
        # tokens first, in their order, then the padding
        order = jnp.argsort(~in_prompt, axis=-1, stable=True)
        tokens_first = jnp.take_along_axis(ids, order, axis=-1)
        row_tokens = jnp.pad(tokens_first, ((0, 0), (0, 1)))
    if output_scores:
        scores = jnp.zeros((batch, slots - width, vocab), working_dtype(model.dtype))
    state = _State(
        tokens=tokens,
        length=end,
        newest=input_ids[:, -1],
        position=counted[:, -1] - 1,
        ended=jnp.zeros(batch, bool),
        cache=unstack_cache(cache) if unstacked else cache,
        seen=seen,
        row_tokens=row_tokens,
        scores=scores,
    )
    return _append(state, out.logits[:, -1], end, sampling, ending, key)


@partial(jax.jit, donate_argnames="state")
def _decode(
    model: CausalModel,
    state: _State,
    end: Int[Array, ""],
    begin: Int[Array, ""],
    sampling: Sampling,
    ending: Ending,
    key: Key[Array, ""] | None,
) -> _State:
    """Decode until `end` columns are written or every row has ended; the prompts have `begin`."""

    def unfinished(state: _State) -> Array:
        return (state.length < end) & ~jnp.all(state.ended)

    def step(state: _State) -> _State:
        out = model(state.newest[:, None], position_ids=state.position[:, None], cache=state.cache)
        state = replace(state, cache=out.cache)
        return _append(state, out.logits[:, -1], begin, sampling, ending, key)

    return jax.lax.while_loop(unfinished, step, state)


def _append(
    state: _State,
    logits: Float[Array, "batch vocab"],
    begin: Int[Array, ""],
    sampling: Sampling,
    ending: Ending,
    key: Key[Array, ""] | None,
) -> _State:
    """The state with the next token, chosen from `logits`."""
    wide = logits.astype(working_dtype(logits.dtype))
    lengths = state.position + 1
    scores = filtered(sampling, wide, state.row_tokens, lengths, state.seen)
    count = state.length - begin
    step_key = jax.random.fold_in(key, count) if sampling.do_sample and key is not None else None
    newest = jnp.where(state.ended, ending.pad_token_id, choose(sampling, scores, step_key))
    zero = jnp.zeros((), jnp.int32)
    all_scores, seen, row_tokens = state.scores, state.seen, state.row_tokens
    if all_scores is not None:
        all_scores = jax.lax.dynamic_update_slice(all_scores, scores[:, None], (zero, count, zero))
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
        scores=all_scores,
    )
