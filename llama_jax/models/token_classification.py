"""LlamaForTokenClassification: one prediction per token."""

from dataclasses import dataclass
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from llama_jax.attention.cache import KVCache
from llama_jax.config import LlamaConfig
from llama_jax.inputs.labels import require_labels
from llama_jax.inputs.positions import as_array
from llama_jax.models.decoder import DecoderOptions, Embeddings, LlamaModel, Positions, Tokens
from llama_jax.models.pretrained import PretrainedModel
from llama_jax.models.task_head import classification_loss, task_head, wide_logits

DEFAULT_DROPOUT = 0.1  # transformers' own, if the config has none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenClassifierOutput:
    """What `LlamaForTokenClassification` returns; see `CausalLMOutput` for the optional fields.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForTokenClassification
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, num_labels=3
        ... )
        >>> model = LlamaForTokenClassification(config, rngs=nnx.Rngs(0))
        >>> out = model(jnp.array([[5, 6, 7]]), labels=jnp.array([[2, 0, -100]]))
        >>> out.logits.shape, out.loss.shape
        ((1, 3, 3), ())
    """

    logits: Float[Array, "batch seq labels"]
    loss: Float[Array, ""] | None = None
    cache: KVCache | None = None
    hidden_states: tuple[Float[Array, "batch seq hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads seq k"], ...] | None = None


class LlamaForTokenClassification(PretrainedModel):
    """Llama with a linear head on every token.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForTokenClassification
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, num_labels=3
        ... )
        >>> model = LlamaForTokenClassification(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[5, 6, 7]])).logits.shape
        (1, 3, 3)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
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
        **options: Unpack[DecoderOptions],
    ) -> TokenClassifierOutput:
        """Logits of every token and, with `labels`, the cross-entropy.

        Args:
            labels: [batch, seq], not shifted; -100 is ignored.
            options: the other arguments of `LlamaModel.__call__`. With a `dropout_key`, the hidden states
                before the head have dropout, too, with the rate `config.classifier_dropout`.

        Raises:
            ValueError: labels of another shape, dtype or range, or as `LlamaModel.__call__`.
        """
        dropout_key, head_key = options.get("dropout_key"), None
        if dropout_key is not None:
            options["dropout_key"], head_key = jax.random.split(dropout_key)
        decoded = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, segment_ids, **options
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
    """`x` with each element kept with probability 1 - rate and divided by it."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate) if rate < 1 else x, 0)
