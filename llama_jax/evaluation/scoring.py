"""Log-probabilities of tokens, as evaluation harnesses need them.

Sequences are packed into rows of one length, in which a beginning that several share is there once, so that
little is padding and one or two programs are compiled. Logits exist for one chunk of scored tokens at a
time.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import LlamaConfig
from llama_jax.evaluation.packing import Family, Row, distinct_tokens, pack, write_row
from llama_jax.inputs.lengths import padded_length
from llama_jax.loss import default_chunk
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.numerics.matmul import einsum, working_dtype
from llama_jax.text.encode import encode_text
from llama_jax.text.incremental import common_length

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ROW_LENGTHS = (256, 512, 1024, 2048)
# tokens that run in the time of compiling a program: on a CPU, for 135M, 2 s; 1,000 tokens run in 3 s
_COMPILATION = 512


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
    arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
    for index, ids in enumerate(arrays):
        _require_tokens(f"sequence {index}", ids, model)
    return _score_from(model, [ids.tolist() for ids in arrays], [0] * len(arrays), batch_size)


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
    sequences = [[*map(int, context), *map(int, tokens)] for context, tokens in pairs]
    for index, ids in enumerate(sequences):
        _require_tokens(f"sequence {index}", np.asarray(ids, np.int32), model)
    starts = [len(context) - 1 for context, _ in pairs]
    return _score_from(model, sequences, starts, batch_size)


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


def _score_from(
    model: LlamaForCausalLM,
    sequences: Sequence[list[int]],
    starts: Sequence[int],
    batch_size: int,
) -> list[TokenScores]:
    """The scores of the tokens of each sequence that follow the one at its start."""
    empty = TokenScores(np.empty(0, working_dtype(model.dtype)), np.empty(0, bool))
    scores = [empty] * len(sequences)
    for numbers in _same_frequencies(model.config, sequences):
        # the last token of a sequence is only a target
        inputs = [sequences[number][:-1] for number in numbers]
        counts = [
            len(tokens) - starts[number] for number, tokens in zip(numbers, inputs, strict=True)
        ]
        chunk = min(default_chunk(model.config.vocab_size), padded_length(sum(counts)))
        for rows in _batches(model.config, inputs, batch_size):
            arrays = (np.stack(arrays) for arrays in list(zip(*rows, strict=True))[:3])
            hidden = _hidden(model, *arrays)
            members = [(row, local) for row in range(len(rows)) for local in rows[row].slots]
            slots = [
                row * len(rows[row].ids) + rows[row].slots[local][starts[numbers[local]] :]
                for row, local in members
            ]
            targets = [
                sequences[numbers[local]][starts[numbers[local]] + 1 :] for _, local in members
            ]
            log_probs, greedy = _in_chunks(
                model, hidden, np.concatenate(slots), np.concatenate(targets), chunk
            )
            ends = np.cumsum([len(part) for part in slots])[:-1]
            parts = np.split(log_probs, ends), np.split(greedy, ends)
            for (_, local), *part in zip(members, *parts, strict=True):
                scores[numbers[local]] = TokenScores(*part)
    return scores


def _same_frequencies(config: LlamaConfig, sequences: Sequence[list[int]]) -> Iterator[list[int]]:
    """Numbers of sequences that may share a row: all, but for longrope.

    Its frequencies depend on the longest position in a batch (those of `dynamic` do only beyond
    max_position_embeddings). Sequences of a single token have nothing to score.
    """
    rope = config.rope
    limit = rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else None
    numbers = [number for number, tokens in enumerate(sequences) if len(tokens) > 1]
    for long in (False, True):
        group = [
            n for n in numbers if (limit is not None and len(sequences[n]) - 1 > limit) == long
        ]
        if group:
            yield group


def _batches(
    config: LlamaConfig, inputs: Sequence[list[int]], batch_size: int
) -> Iterator[list[Row]]:
    """Rows of all sequences, padded to few shapes; of as many tokens as `batch_size` of the longest."""
    longest = padded_length(max(map(len, inputs)))
    most = batch_size * longest
    packed = min(
        (pack(inputs, least) for least in _row_lengths(most, distinct_tokens(inputs))),
        key=lambda packed: _cost(packed, config.hidden_size),
    )
    for length, rows in packed.items():
        most_rows = max(most // length, 1)
        batches = -(-len(rows) // most_rows)
        size = min(_rounded(-(-len(rows) // batches)), most_rows)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            batch += [[]] * (size - len(batch))
            yield [write_row(inputs, families, length) for families in batch]


def _row_lengths(most: int, distinct: int) -> list[int]:
    """Lengths of rows to choose from, for batches of up to `most` tokens of so many that differ.

    One of them holds all, if it is not too long: else continuations of one context may need a second row,
    which has the context as well, or one of twice the length.
    """
    tokens = min(most, distinct)
    lengths = [length for length in _ROW_LENGTHS if length <= tokens]
    complete = padded_length(tokens)
    return [*lengths, complete] if complete <= _ROW_LENGTHS[-1] or not lengths else lengths


def _cost(packed: dict[int, list[list[Family]]], hidden: int) -> float:
    """The time of rows, in tokens: attention to n keys is about n / (4 hidden) of a layer's matmuls."""
    return sum(
        _COMPILATION + len(rows) * length * (1 + length / (4 * hidden))
        for length, rows in packed.items()
    )


def _rounded(count: int) -> int:
    """At least `count`, and at most a quarter more: 1, ..., 8, 10, 12, 14, 16, 20, ..."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step


@jax.jit
def _hidden(
    model: LlamaForCausalLM,
    ids: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    visible_until: Int[Array, "rows length"],
) -> Float[Array, "tokens hidden"]:
    out = model.model(ids, position_ids=positions, visible_until=visible_until)
    return out.last_hidden_state.reshape(-1, out.last_hidden_state.shape[-1])


def _in_chunks(
    model: LlamaForCausalLM,
    hidden: Float[Array, "tokens hidden"],
    slots: Int[np.ndarray, " scored"],
    targets: Int[np.ndarray, " scored"],
    chunk: int,
) -> tuple[Float[np.ndarray, " scored"], Bool[np.ndarray, " scored"]]:
    """`token_log_probs` of the targets after the tokens in `slots`."""
    missing = -len(slots) % chunk
    padded = np.pad(np.stack([slots, targets]).astype(np.int32), ((0, 0), (0, missing)))
    parts = [
        _log_probs(model, hidden, *padded[:, start : start + chunk])
        for start in range(0, padded.shape[1], chunk)
    ]
    log_probs, greedy = (np.concatenate(part)[: len(slots)] for part in zip(*parts, strict=True))
    return log_probs, greedy


@jax.jit
def _log_probs(
    model: LlamaForCausalLM,
    hidden: Float[Array, "tokens hidden"],
    slots: Int[Array, " chunk"],
    targets: Int[Array, " chunk"],
) -> tuple[Float[Array, " chunk"], Bool[Array, " chunk"]]:
    return token_log_probs(hidden[slots], model.head_weight, targets, len(targets))


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
