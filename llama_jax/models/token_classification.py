"""LlamaForTokenClassification: one prediction a token."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from llama_jax.attention.cache import KVCache
from llama_jax.config import LlamaConfig
from llama_jax.inputs.labels import require_labels
from llama_jax.inputs.positions import as_array
from llama_jax.models.decoder import Embeddings, LlamaModel, Positions, Tokens
from llama_jax.models.pretrained import PretrainedModel
from llama_jax.models.task_head import classification_loss, task_head, wide_logits

DEFAULT_DROPOUT = 0.1  # transformers' own where the config says nothing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenClassifierOutput:
    """What `LlamaForTokenClassification` returns; fields not asked for are None."""

    logits: Float[Array, "batch seq labels"]
    loss: Float[Array, ""] | None = None
    cache: KVCache | None = None
    hidden_states: tuple[Float[Array, "batch seq hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads seq k"], ...] | None = None


class LlamaForTokenClassification(PretrainedModel):
    """Llama with a linear head on every token."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        self.model = LlamaModel(config, rngs=rngs, dtype=dtype)
        self.score = task_head(config, config.label_count, use_bias=True, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights and of the computation."""
        return self.model.dtype

    def __call__(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Array | np.ndarray | None = None,
        position_ids: Positions | None = None,
        inputs_embeds: Embeddings | None = None,
        segment_ids: Tokens | None = None,
        labels: Array | np.ndarray | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
        **options: Any,
    ) -> TokenClassifierOutput:
        """Logits of every token and, with `labels`, the cross-entropy.

        Args:
            labels: [batch, seq], not shifted; -100 is ignored.
            dropout_key: turns dropout on (training): of the attention and, by `config.classifier_dropout`,
                of the hidden states before the head.
            options: the further arguments of `LlamaModel.__call__`.

        Raises:
            ValueError: labels that do not fit, or as `LlamaModel.__call__`.
        """
        decoder_key, head_key = (
            (None, None) if dropout_key is None else jax.random.split(dropout_key)
        )
        decoded = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            segment_ids,
            dropout_key=decoder_key,
            **options,
        )
        hidden = decoded.last_hidden_state
        if head_key is not None:
            rate = self.config.classifier_dropout
            hidden = dropout(hidden, DEFAULT_DROPOUT if rate is None else rate, head_key)
        logits = wide_logits(hidden, self.score)
        loss = None
        if labels is not None:
            labels = as_array(labels)
            require_labels(labels, hidden.shape[:2], self.config.label_count)
            loss = classification_loss(hidden, self.score, jnp.asarray(labels))
        return TokenClassifierOutput(
            logits=logits.astype(hidden.dtype),
            loss=loss,
            cache=decoded.cache,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )


def dropout(
    x: Float[Array, "*batch hidden"], rate: float, key: Key[Array, ""]
) -> Float[Array, "*batch hidden"]:
    """`x` with each number kept at a probability of 1 - rate, and scaled up by it."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate) if rate < 1 else x, 0)
