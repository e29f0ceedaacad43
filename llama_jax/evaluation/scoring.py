"""Log-probabilities of tokens, as evaluation harnesses need them.

Sequences are sorted by length and padded to a few lengths, so that few programs are compiled. Logits exist
for one chunk of tokens at a time.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.attention.cache import KVCache, init_cache
from llama_jax.config import LlamaConfig
from llama_jax.loss import default_chunk
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.numerics.matmul import einsum, working_dtype
from llama_jax.text.encode import encode_text
from llama_jax.text.incremental import common_length

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MIN_LENGTH = 16


class TokenScores(NamedTuple):
    """Scores of a sequence of tokens, each given all tokens before it.

    Attributes:
        log_probs: natural log-probability of each token, in float32 (float64 for a float64 model).
        greedy: whether the token is the most likely one.

    >>> scores = TokenScores(np.log([0.5, 0.25]), np.array([True, False]))
    >>> round(scores.total, 4), scores.is_greedy
    (-2.0794, False)
    """

    log_probs: Float[np.ndarray, " tokens"]
    greedy: Bool[np.ndarray, " tokens"]

    @property
    def total(self) -> float:
        """The log-probability of all tokens together."""
        return float(np.sum(self.log_probs, dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding generates exactly these tokens."""
        return bool(self.greedy.all())


def token_scores(
    model: LlamaForCausalLM, sequences: Sequence[Sequence[int]], *, batch_size: int = 8
) -> list[TokenScores]:
    """Score every token but the first of each sequence.

    The scores of a sequence do not depend on the sequences batched with it.

    Raises:
        ValueError: an empty sequence, ids outside the vocabulary, or more tokens than positions.

    >>> from flax import nnx
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    >>> long, short = token_scores(model, [[1, 5, 6, 7], [1, 8]])
    >>> long.log_probs.shape, short.log_probs.shape
    ((3,), (1,))
    """
    config = model.config
    arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
    for index, ids in enumerate(arrays):
        _require_tokens(f"sequence {index}", ids, model)
    scores: list[TokenScores] = [
        TokenScores(np.empty(0, working_dtype(model.dtype)), np.empty(0, bool))
    ] * len(arrays)
    # the last token of a sequence is only a target
    lengths = [len(ids) - 1 for ids in arrays]
    # longrope's frequencies depend on the longest position in a batch (those of `dynamic` do only beyond
    # max_position_embeddings, which is refused above)
    same_length = config.rope["rope_type"] == "longrope"
    for batch in _batches(lengths, batch_size, same_length):
        longest = lengths[batch[0]]
        shape = _power_of_two(len(batch), batch_size), _bucket(longest)
        inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, index in enumerate(batch):
            inputs[row, : lengths[index]] = arrays[index][:-1]
            targets[row, : lengths[index]] = arrays[index][1:]
        # padding must not be the longest position either
        positions = np.minimum(np.arange(shape[1], dtype=np.int32), longest - 1)[None]
        log_probs, greedy = map(np.asarray, _score(model, inputs, targets, positions))
        for row, index in enumerate(batch):
            unpadded = slice(lengths[index])
            scores[index] = TokenScores(log_probs[row, unpadded], greedy[row, unpadded])
    return scores


def loglikelihood(
    model: LlamaForCausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
) -> list[TokenScores]:
    """Score each continuation after its context.

    `.total` and `.is_greedy` of a result are what lm-evaluation-harness calls loglikelihood. A context that
    several pairs have is run once.

    Args:
        pairs: ids of a context and of its continuation.

    Raises:
        ValueError: an empty context or continuation, or as `token_scores`.

    >>> from flax import nnx
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    >>> choices = loglikelihood(model, [([1, 4, 9], [5]), ([1, 4, 9], [6, 7])])
    >>> [choice.log_probs.shape for choice in choices]
    [(1,), (2,)]
    """
    for index, (context, continuation) in enumerate(pairs):
        for name, tokens in (("context", context), ("continuation", continuation)):
            if not len(tokens):
                raise ValueError(f"{name} {index}: found no tokens, expected at least one")
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(index)
    # frequencies that depend on the length are those of the whole sequence
    may_share = model.config.rope["rope_type"] not in ("dynamic", "longrope")
    shared = [indices for indices in groups.values() if may_share and len(indices) > 1]
    scores: dict[int, TokenScores] = {}
    for index, score in _after_shared_contexts(model, pairs, shared, batch_size):
        scores[index] = score
    alone = [index for index in range(len(pairs)) if index not in scores]
    sequences = [[*pairs[index][0], *pairs[index][1]] for index in alone]
    for index, score in zip(
        alone, token_scores(model, sequences, batch_size=batch_size), strict=True
    ):
        length = len(pairs[index][1])
        scores[index] = TokenScores(score.log_probs[-length:], score.greedy[-length:])
    return [scores[index] for index in range(len(pairs))]


def _after_shared_contexts(
    model: LlamaForCausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    groups: Sequence[list[int]],
    batch_size: int,
) -> Iterator[tuple[int, TokenScores]]:
    """The scores of several continuations of each context, which is run once.

    Args:
        groups: indices of pairs that have the same context.
    """
    for index in itertools.chain(*groups):
        _require_tokens(
            f"sequence {index}", np.asarray([*pairs[index][0], *pairs[index][1]]), model
        )
    longest = max((len(pairs[index][1]) for index in itertools.chain(*groups)), default=1)
    least = _power_of_two(longest, _MIN_LENGTH)  # short ones need no programs of their own
    for batch in _batches([len(pairs[group[0]][0]) for group in groups], batch_size, False):
        contexts = [pairs[groups[number][0]][0] for number in batch]
        width = _bucket(len(contexts[0]))
        rows = _power_of_two(len(batch), batch_size)
        ids, is_token = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        for row, context in enumerate(contexts):
            ids[row, width - len(context) :] = context
            is_token[row, width - len(context) :] = True
        members = [(row, index) for row, number in enumerate(batch) for index in groups[number]]
        members.sort(key=lambda member: -len(pairs[member[1]][1]))
        # the last token of a continuation is only a target
        new = max(least, _power_of_two(len(pairs[members[0][1]][1]), 2**30))
        last, cache = _prefill(model, ids, is_token, capacity=width + new - 1)
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            size = _power_of_two(len(part), batch_size)
            targets, source = np.zeros((size, new), np.int32), np.zeros(size, np.int32)
            for row, (context_row, index) in enumerate(part):
                continuation = pairs[index][1]
                targets[row, : len(continuation)] = continuation
                source[row] = context_row
            log_probs, greedy = map(np.asarray, _continue(model, last, cache, source, targets))
            for row, (_, index) in enumerate(part):
                length = len(pairs[index][1])
                yield index, TokenScores(log_probs[row, :length], greedy[row, :length])


def loglikelihood_rolling(
    model: LlamaForCausalLM,
    sequences: Sequence[Sequence[int]],
    *,
    prefix_token_id: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
) -> list[TokenScores]:
    """Score every token of texts of any length once, in windows of `max_length`.

    The windows are those of lm-evaluation-harness: the first begins with the prefix token; each later one
    scores as many new tokens as fit, the last one with as much context as fits.

    Args:
        prefix_token_id: put before the first token; default: the config's bos, else its first eos.
        max_length: tokens per window; default: max_position_embeddings.

    Raises:
        ValueError: no prefix token, an empty sequence, or as `token_scores`.

    >>> from flax import nnx
    >>> config = LlamaConfig(
    ...     vocab_size=32,
    ...     hidden_size=16,
    ...     intermediate_size=32,
    ...     num_hidden_layers=1,
    ...     num_attention_heads=2,
    ...     max_position_embeddings=8,
    ... )
    >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    >>> (scores,) = loglikelihood_rolling(model, [range(20)], prefix_token_id=1)
    >>> scores.log_probs.shape
    (20,)
    """
    config = model.config
    length = config.max_position_embeddings if max_length is None else max_length
    if not 1 <= length <= config.max_position_embeddings:
        raise ValueError(
            f"max_length: found {length}, expected 1 to "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    if prefix_token_id is None:
        prefix_token_id = prefix_token(config)
    if prefix_token_id is None:
        raise ValueError("prefix_token_id: required, because the config has no bos or eos token")
    windows = [rolling_windows(sequence, prefix_token_id, length) for sequence in sequences]
    scores = iter(loglikelihood(model, list(itertools.chain(*windows)), batch_size=batch_size))
    by_sequence = [list(itertools.islice(scores, len(pairs))) for pairs in windows]
    return [TokenScores(*map(np.concatenate, zip(*parts, strict=True))) for parts in by_sequence]


def rolling_windows(
    tokens: Sequence[int], prefix: int, length: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Pairs of context and continuation that score each of `tokens` once.

    Args:
        prefix: the token before the first one.
        length: tokens that the model sees at once.

    >>> rolling_windows([10, 11, 12, 13, 14], prefix=1, length=2)
    [([1], [10, 11]), ([11], [12, 13]), ([12, 13], [14])]
    """
    if not len(tokens):
        raise ValueError("sequence: found no tokens, expected at least one")
    windows: list[tuple[Sequence[int], Sequence[int]]] = [([prefix], tokens[:length])]
    for start in range(length, len(tokens), length):
        end = min(start + length, len(tokens))
        windows.append((tokens[end - length - 1 : start], tokens[start:end]))
    return windows


def encode_pair(
    tokenizer: "Tokenizer", context: str, continuation: str, *, prefix_token_id: int | None = None
) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation, split as in lm-evaluation-harness.

    Spaces at the end of the context move to the continuation. Both are encoded as one text, so the tokens
    are those that the model would see. The context's tokens are those that it has when encoded alone; a
    token that spans the boundary belongs to the continuation. The beginning-of-text token comes once, the
    end-of-text token is left out.

    Args:
        prefix_token_id: replaces an empty context, see `prefix_token`. If it is None, the context of the
            result may be empty.

    >>> from tokenizers import Tokenizer, models
    >>> letters = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2}, []))
    >>> encode_pair(letters, "ab ", "ba")
    ([0, 1], [2, 1, 0])
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before, ids = encode_text(tokenizer, stripped + continuation)
    if not context and prefix_token_id is not None:
        before = []
    shared = common_length(encode_text(tokenizer, stripped).ids, ids)
    context_ids, continuation_ids = before + ids[:shared], ids[shared:]
    if context_ids or prefix_token_id is None:
        return context_ids, continuation_ids
    if continuation_ids[:1] == [prefix_token_id]:
        return continuation_ids[:1], continuation_ids[1:]
    return [prefix_token_id], continuation_ids


def prefix_token(
    config: LlamaConfig,
    tokenizer: "Tokenizer | None" = None,
    special_tokens: Mapping[str, str] | None = None,
) -> int | None:
    """The token to put before a text without a context: bos, else eos, else None.

    The tokenizer's tokens take precedence over the config's; lm-evaluation-harness uses only those.

    Args:
        special_tokens: the tokenizer's, by name; see `llama_jax.text.tokenizer.special_tokens`.

    >>> prefix_token(LlamaConfig(bos_token_id=1, eos_token_id=2))
    1
    """
    for name in ("bos_token", "eos_token"):
        text = (special_tokens or {}).get(name)
        token = None if tokenizer is None or text is None else tokenizer.token_to_id(text)
        if token is not None and token < config.vocab_size:
            return token
    bos = config.bos_token_id
    ids = [*(() if bos is None else (bos,)), *config.eos_token_ids]
    return next((i for i in ids if 0 <= i < config.vocab_size), None)


def token_log_probs(
    hidden: Float[Array, "tokens hidden"],
    head: Float[Array, "vocab hidden"],
    targets: Int[Array, " tokens"],
    chunk: int,
) -> tuple[Float[Array, " tokens"], Bool[Array, " tokens"]]:
    """log softmax(hidden head^T) at each target, and whether the target has the largest logit.

    Holds [chunk, vocab]. `fused_linear_cross_entropy` with reduction="none" gives the first, but not the
    second.
    """
    working = working_dtype(hidden.dtype)

    def of_chunk(part: tuple[Array, Array]) -> tuple[Array, Array]:
        x, target = part
        logits = einsum("th,vh->tv", x, head, out_dtype=working)
        target_logit = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        row_max = jnp.max(logits, axis=-1)
        log_sum = jnp.log(jnp.sum(jnp.exp(logits - row_max[:, None]), axis=-1))
        return (target_logit - row_max) - log_sum, jax.lax.argmax(logits, 1, jnp.int32) == target

    count = len(targets)
    chunk = min(chunk, count)
    missing = -count % chunk
    hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    targets = jnp.pad(targets, (0, missing)).reshape(-1, chunk)
    log_probs, greedy = jax.lax.map(of_chunk, (hidden, targets))
    return log_probs.reshape(-1)[:count], greedy.reshape(-1)[:count]


@jax.jit
def _score(
    model: LlamaForCausalLM,
    inputs: Int[Array, "batch seq"],
    targets: Int[Array, "batch seq"],
    positions: Int[Array, "1 seq"],
) -> tuple[Float[Array, "batch seq"], Bool[Array, "batch seq"]]:
    hidden = model.model(inputs, position_ids=positions).last_hidden_state
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = default_chunk(model.config.vocab_size)
    log_probs, greedy = token_log_probs(flat, model.head_weight, targets.reshape(-1), chunk)
    return log_probs.reshape(targets.shape), greedy.reshape(targets.shape)


@partial(jax.jit, static_argnames="capacity")
def _prefill(
    model: LlamaForCausalLM,
    ids: Int[Array, "batch seq"],
    is_token: Bool[Array, "batch seq"],
    capacity: int,
) -> tuple[Float[Array, "batch hidden"], KVCache]:
    """The last hidden state of each context, padded on the left, and the cache after it."""
    positions = jnp.maximum(jnp.cumsum(is_token, axis=-1, dtype=jnp.int32) - 1, 0)
    out = model.model(
        ids,
        attention_mask=is_token,
        position_ids=positions,
        cache=init_cache(model.config, len(ids), capacity, model.dtype),
    )
    assert out.cache is not None
    return out.last_hidden_state[:, -1], out.cache


@jax.jit
def _continue(
    model: LlamaForCausalLM,
    last: Float[Array, "contexts hidden"],
    cache: KVCache,
    source: Int[Array, " batch"],
    targets: Int[Array, "batch seq"],
) -> tuple[Float[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """The scores of continuations, row r of which follows the context `source[r]`."""
    hidden = last[source][:, None]
    if targets.shape[1] > 1:
        tokens = cache.is_token.sum(axis=1, dtype=jnp.int32)[source]
        own = replace(
            cache,
            keys=jax.tree.map(lambda array: array[:, source], cache.keys),
            values=jax.tree.map(lambda array: array[:, source], cache.values),
            is_token=cache.is_token[source],
            segments=cache.segments[source],
        )
        inputs = targets[:, :-1]
        positions = tokens[:, None] + jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
        out = model.model(inputs, position_ids=positions, cache=own)
        hidden = jnp.concatenate([hidden, out.last_hidden_state], axis=1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = default_chunk(model.config.vocab_size)
    log_probs, greedy = token_log_probs(flat, model.head_weight, targets.reshape(-1), chunk)
    return log_probs.reshape(targets.shape), greedy.reshape(targets.shape)


def _require_tokens(name: str, ids: np.ndarray, model: LlamaForCausalLM) -> None:
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not ids.size:
        raise ValueError(f"{name}: found no tokens, expected at least one")
    if len(ids) - 1 > limit:
        raise ValueError(
            f"{name}: found {len(ids)} tokens, expected at most {limit + 1} for "
            f"max_position_embeddings={limit}"
        )
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise ValueError(f"{name}: found token {outside[0]}, expected 0 to {vocab - 1}")


def _batches(lengths: Sequence[int], batch_size: int, same_length: bool) -> Iterator[list[int]]:
    """Batches of the indices of sequences that have anything to score, the longest first.

    Args:
        same_length: only batch sequences of equal length.
    """
    indices = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    for _, group in itertools.groupby(indices, key=lambda i: lengths[i] if same_length else 0):
        members = list(group)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, ...; beyond 16, at most a third is padding."""
    size = _MIN_LENGTH
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def _power_of_two(rows: int, most: int) -> int:
    return min(1 << (rows - 1).bit_length(), most)
