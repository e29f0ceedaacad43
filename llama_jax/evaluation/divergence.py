"""How much two causal models differ on a text."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.loss import default_chunk
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.numerics.matmul import einsum, working_dtype


class Divergence(NamedTuple):
    """Result of `divergence`.

    Attributes:
        tokens: number of predictions.
        kl: mean of KL(reference || other) in nats.
        reference_perplexity, perplexity: of the reference and of the other model.
    """

    tokens: int
    kl: float
    reference_perplexity: float
    perplexity: float


def divergence(
    reference: LlamaForCausalLM,
    other: LlamaForCausalLM,
    tokens: Sequence[int] | Int[np.ndarray, " tokens"],
    *,
    window: int = 512,
) -> Divergence:
    """Compare two models on a text in windows of tokens; no window sees the tokens before it.

    Only the logits of one chunk of tokens are in memory at a time.

    Args:
        tokens: at least two ids; a last window of a single token is left out.
        window: tokens per window.

    Raises:
        ValueError: too few tokens, or a window larger than max_position_embeddings.

    >>> from flax import nnx
    >>> from llama_jax import LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> one, other = (LlamaForCausalLM(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    >>> result = divergence(one, other, range(20))
    >>> result.tokens, result.kl > 0
    (19, True)
    """
    limit = reference.config.max_position_embeddings
    if not 2 <= window <= limit:
        raise ValueError(f"window: found {window}, expected 2 to max_position_embeddings={limit}")
    ids = np.asarray(tokens, np.int32)
    if len(ids) < 2:
        raise ValueError(f"tokens: found {len(ids)}, expected at least 2")
    totals, count = np.zeros(3), 0
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window]
        totals += np.stack(_totals(reference, other, part[None]), dtype=np.float64)
        count += len(part) - 1
    kl, surprise, other_surprise = totals / count
    return Divergence(count, float(kl), float(np.exp(surprise)), float(np.exp(other_surprise)))


@jax.jit
def _totals(
    reference: LlamaForCausalLM, other: LlamaForCausalLM, ids: Int[Array, "1 seq"]
) -> tuple[Float[Array, ""], ...]:
    """Sums over all positions but the last: KL, and -log p of the next token in both models."""
    models = reference, other
    heads = [model.head_weight for model in models]
    hidden = [model.model(ids[:, :-1]).last_hidden_state[0] for model in models]

    def of_chunk(_: None, inputs: tuple[Array, list[Array]]) -> tuple[None, tuple[Array, ...]]:
        target, rows = inputs
        logs = [_log_probs(row, head) for row, head in zip(rows, heads, strict=True)]
        chosen = [-jnp.take_along_axis(log, target[:, None], axis=-1)[:, 0] for log in logs]
        kl = jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1].astype(logs[0].dtype)), axis=-1)
        return None, (kl, *chosen)

    count, targets = ids.shape[1] - 1, ids[0, 1:]
    chunk = min(default_chunk(reference.config.vocab_size), count)

    def chunks(x: Array) -> Array:
        padded = jnp.pad(x, ((0, -count % chunk), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(-1, chunk, *x.shape[1:])

    inputs = chunks(targets), [chunks(rows) for rows in hidden]
    _, per_token = jax.lax.scan(of_chunk, None, inputs)
    return tuple(jnp.sum(values.reshape(-1)[:count]) for values in per_token)


def _log_probs(
    hidden: Float[Array, "chunk hidden"], head: Float[Array, "vocab hidden"]
) -> Float[Array, "chunk vocab"]:
    logits = einsum("th,vh->tv", hidden, head, out_dtype=working_dtype(hidden.dtype))
    return jax.nn.log_softmax(logits, axis=-1)
