"""Log-probabilities of given tokens: what evaluation harnesses ask of a model.

Sequences are sorted by length and padded to a few lengths, so that few programs are compiled; the logits
are formed a chunk of tokens at a time and never held for all of them.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import LlamaConfig
from llama_jax.loss import default_chunk
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.numerics.matmul import einsum, working_dtype
from llama_jax.text.encode import encode_text
from llama_jax.text.incremental import common_length

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHORTEST = 16


class TokenScores(NamedTuple):
    """Of each scored token, given all before it: its log-probability, and whether it is the likeliest.

    Natural logarithms in float32 (float64 of a float64 model), both [tokens].
    """

    log_probs: Float[np.ndarray, " tokens"]
    greedy: Bool[np.ndarray, " tokens"]

    @property
    def total(self) -> float:
        """The log-probability of all tokens together."""
        return float(np.sum(self.log_probs, dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written these tokens."""
        return bool(self.greedy.all())


def token_scores(
    model: LlamaForCausalLM, sequences: Sequence[Sequence[int]], *, batch_size: int = 8
) -> list[TokenScores]:
    """Scores of every token but the first of each sequence, whatever the others beside it.

    Raises:
        ValueError: an empty sequence, ids outside the vocabulary, or more tokens than positions.
    """
    config = model.config
    arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
    for place, ids in enumerate(arrays):
        _require_tokens(f"sequence {place}", ids, model)
    scores: list[TokenScores] = [
        TokenScores(np.empty(0, working_dtype(model.dtype)), np.empty(0, bool))
    ] * len(arrays)
    # the last token of a sequence is only a target
    lengths = [len(ids) - 1 for ids in arrays]
    # its frequencies follow the longest position of a batch (those of `dynamic` only beyond the limit)
    alike = config.rope["rope_type"] == "longrope"
    for rows in _batches(lengths, batch_size, alike):
        longest = lengths[rows[0]]
        shape = _power_of_two(len(rows), batch_size), _bucket(longest)
        inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, place in enumerate(rows):
            inputs[row, : lengths[place]] = arrays[place][:-1]
            targets[row, : lengths[place]] = arrays[place][1:]
        # padding must not be the longest position either
        positions = np.minimum(np.arange(shape[1], dtype=np.int32), longest - 1)[None]
        log_probs, greedy = map(np.asarray, _score(model, inputs, targets, positions))
        for row, place in enumerate(rows):
            kept = slice(lengths[place])
            scores[place] = TokenScores(log_probs[row, kept], greedy[row, kept])
    return scores


def loglikelihood(
    model: LlamaForCausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
) -> list[TokenScores]:
    """Scores of each continuation's tokens after its context; `.total` and `.is_greedy` of each are
    what lm-evaluation-harness calls loglikelihood.

    Raises:
        ValueError: an empty context or continuation, or as `token_scores`.
    """
    for place, (context, continuation) in enumerate(pairs):
        for name, tokens in (("context", context), ("continuation", continuation)):
            if not len(tokens):
                raise ValueError(f"{name} {place}: found no tokens, expected at least one")
    whole = token_scores(model, [[*c, *t] for c, t in pairs], batch_size=batch_size)
    return [
        TokenScores(scores.log_probs[-len(t) :], scores.greedy[-len(t) :])
        for scores, (_, t) in zip(whole, pairs, strict=True)
    ]


def loglikelihood_rolling(
    model: LlamaForCausalLM,
    sequences: Sequence[Sequence[int]],
    *,
    prefix_token_id: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
) -> list[TokenScores]:
    """Scores of every token of texts of any length, each token once, in windows of `max_length`.

    The windows are those of lm-evaluation-harness: the first begins with the prefix token; each later one
    scores as many new tokens as it has room for, the last one with as much context as fits.

    Args:
        prefix_token_id: what the first token is given; default: the config's bos, else its first eos.
        max_length: tokens the model sees at once; default: max_position_embeddings.

    Raises:
        ValueError: no prefix token, an empty sequence, or as `token_scores`.
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
        raise ValueError("prefix_token_id: found no bos or eos in the config, expected a token")
    windows = [rolling_windows(sequence, prefix_token_id, length) for sequence in sequences]
    pairs = [window for of_text in windows for window in of_text]
    scored = iter(loglikelihood(model, pairs, batch_size=batch_size))
    parts = [list(itertools.islice(scored, len(of_text))) for of_text in windows]
    return [TokenScores(*map(np.concatenate, zip(*of_text, strict=True))) for of_text in parts]


def rolling_windows(
    tokens: Sequence[int], prefix: int, length: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Pairs of context and continuation that score each of `tokens` once, `length` inputs at most."""
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
    """Tokens of a context and of what follows, by the rule of lm-evaluation-harness.

    Spaces at the end of the context go to the continuation, and both are encoded as one text, so that
    the tokens are those that the model would have read. The context is as many of them as it has when
    encoded alone; where a token spans the boundary, only those before it, so that none is lost. An empty
    context takes the prefix token. The tokenizer's beginning of text comes once, its end not at all.

    Args:
        prefix_token_id: what an empty context becomes, see `prefix_token`. If it is None, the context
            of the result may be empty.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    before, whole = encode_text(tokenizer, bare + continuation)
    if not context and prefix_token_id is not None:
        before = []
    shared = common_length(encode_text(tokenizer, bare).ids, whole)
    first, rest = before + whole[:shared], whole[shared:]
    if first or prefix_token_id is None:
        return first, rest
    if rest[:1] == [prefix_token_id]:
        return rest[:1], rest[1:]
    return [prefix_token_id], rest


def prefix_token(
    config: LlamaConfig,
    tokenizer: "Tokenizer | None" = None,
    special_tokens: Mapping[str, str] | None = None,
) -> int | None:
    """The token before a text that has nothing before it: bos, else eos, if any.

    The tokenizer's go before the config's, as in lm-evaluation-harness, which asks no config.

    Args:
        special_tokens: of the tokenizer, by name, see `llama_jax.text.tokenizer.special_tokens`.
    """
    for name in ("bos_token", "eos_token"):
        text = (special_tokens or {}).get(name)
        found = None if tokenizer is None or text is None else tokenizer.token_to_id(text)
        if found is not None and found < config.vocab_size:
            return found
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

    Holds [chunk, vocab]. A likeliest token cannot be told from the loss alone; else `reduction="none"` of
    `fused_linear_cross_entropy` would do.
    """
    working = working_dtype(hidden.dtype)

    def of_chunk(part: tuple[Array, Array]) -> tuple[Array, Array]:
        x, target = part
        logits = einsum("th,vh->tv", x, head, out_dtype=working)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        top = jnp.max(logits, axis=-1)
        log_sum = jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))
        return (chosen - top) - log_sum, jax.lax.argmax(logits, 1, jnp.int32) == target

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


def _require_tokens(name: str, ids: np.ndarray, model: LlamaForCausalLM) -> None:
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not ids.size:
        raise ValueError(f"{name}: found no tokens, expected at least one")
    if len(ids) - 1 > limit:
        raise ValueError(
            f"{name}: found {len(ids)} tokens, expected at most {limit + 1} for "
            f"max_position_embeddings={limit}"
        )
    wrong = ids[(ids < 0) | (ids >= vocab)]
    if wrong.size:
        raise ValueError(f"{name}: found token {wrong[0]}, expected 0 to {vocab - 1}")


def _batches(lengths: Sequence[int], batch_size: int, alike: bool) -> Iterator[list[int]]:
    """Places of the sequences that have anything to score, the longest first, a batch at a time.

    alike: only sequences of one length together.
    """
    places = sorted((p for p, n in enumerate(lengths) if n), key=lambda p: -lengths[p])
    for _, group in itertools.groupby(places, key=lambda p: lengths[p] if alike else 0):
        members = list(group)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, ...: at most a third is padding beyond the shortest."""
    size = _SHORTEST
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def _power_of_two(rows: int, most: int) -> int:
    return min(1 << (rows - 1).bit_length(), most)
