"""LlamaForSequenceClassification: one prediction per sequence, from its last token."""

from dataclasses import dataclass
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.attention.cache import KVCache
from llama_jax.config import LlamaConfig
from llama_jax.inputs.labels import require_labels
from llama_jax.inputs.positions import as_array
from llama_jax.models.decoder import DecoderOptions, Embeddings, LlamaModel, Positions, Tokens
from llama_jax.models.layers import Linear
from llama_jax.models.pretrained import PretrainedModel
from llama_jax.models.task_head import classification_loss, task_head, wide_logits

_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceClassifierOutput:
    """What `LlamaForSequenceClassification` returns; see `CausalLMOutput` for the optional fields.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForSequenceClassification
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, num_labels=3
        ... )
        >>> model = LlamaForSequenceClassification(config, rngs=nnx.Rngs(0))
        >>> out = model(jnp.array([[5, 6, 7]]), labels=jnp.array([2]))
        >>> out.logits.shape, out.loss.shape
        ((1, 3), ())
    """

    logits: Float[Array, "batch labels"]
    loss: Float[Array, ""] | None = None
    cache: KVCache | None = None
    hidden_states: tuple[Float[Array, "batch seq hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads seq k"], ...] | None = None


class LlamaForSequenceClassification(PretrainedModel):
    """Llama with a linear head on the last token of each sequence, for classification or regression.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForSequenceClassification
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, num_labels=3, pad_token_id=0
        ... )
        >>> model = LlamaForSequenceClassification(config, rngs=nnx.Rngs(0))
        >>> ids = jnp.array([[5, 6, 7], [5, 0, 0]])
        >>> model(ids).logits.shape
        (2, 3)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.model = LlamaModel(config, rngs=rngs, dtype=dtype)
        self.score = task_head(config, config.label_count, use_bias=False, dtype=dtype, rngs=rngs)

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
    ) -> SequenceClassifierOutput:
        """Logits of each sequence's last token and, with `labels`, the loss.

        As in transformers, the last token is the rightmost one that is not `config.pad_token_id`, whatever
        the attention mask says; with `inputs_embeds`, or without a padding token, it is the last position.

        Args:
            labels: the loss is chosen by `config.problem_type`. "single_label_classification" (default for
                integers): [batch] or [batch, 1], -100 is ignored; cross-entropy. "regression" (default
                with one label): numbers [batch, labels], or [batch] for one label; mean squared error.
                "multi_label_classification" (default for floats): [batch, labels] from 0 to 1; binary
                cross-entropy.
            options: the other arguments of `LlamaModel.__call__`.

        Raises:
            ValueError: more than one sequence without a padding token; labels of another shape, dtype or
                range; or as `LlamaModel.__call__`.
        """
        decoded = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, segment_ids, **options
        )
        hidden = decoded.last_hidden_state
        batch, pad = hidden.shape[0], self.config.pad_token_id
        if pad is None and batch > 1:
            raise ValueError(f"pad_token_id: null in the config, but a batch of {batch} needs one")
        if pad is None or input_ids is None:
            pooled = hidden[:, -1]
        else:
            last = last_token(jnp.asarray(input_ids), pad)
            pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        logits = wide_logits(pooled, self.score)
        loss = None
        if labels is not None:
            problem = self.config.problem_type
            loss = sequence_classification_loss(pooled, self.score, as_array(labels), problem)
        return SequenceClassifierOutput(
            logits=logits.astype(hidden.dtype),
            loss=loss,
            cache=decoded.cache,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )


def last_token(input_ids: Int[Array, "batch seq"], pad_token_id: int) -> Int[Array, " batch"]:
    """The index of each row's rightmost token that is not padding; 0 in a row of padding."""
    indices = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(input_ids != pad_token_id, indices, 0), axis=-1)


def sequence_classification_loss(
    pooled: Float[Array, "batch hidden"],
    head: Linear,
    labels: Array | np.ndarray,
    problem_type: str | None = None,
) -> Float[Array, ""]:
    """The loss of `problem_type`, which for None follows from the labels as in transformers.

    Args:
        labels: for "regression" (default with one label) numbers [batch, labels], or [batch] for one label:
            mean squared error. For "single_label_classification" (default of integers) [batch] or
            [batch, 1], -100 ignored: cross-entropy. For "multi_label_classification" (default of floats)
            [batch, labels] from 0 to 1: binary cross-entropy.

    Raises:
        ValueError: labels of another shape, dtype or range, or an unknown `problem_type`.
    """
    batch, count = len(pooled), len(head.weight[...])
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if problem_type not in (None, *_PROBLEM_TYPES):
        raise ValueError(
            f"problem_type: found {problem_type!r}, expected null or one of {', '.join(_PROBLEM_TYPES)}"
        )
    if problem_type is None:
        classification = "single_label_classification" if integers else "multi_label_classification"
        problem_type = "regression" if count == 1 else classification
    if problem_type == "single_label_classification":
        labels = labels[:, 0] if labels.shape == (batch, 1) else labels
        require_labels(labels, (batch,), count)
        return classification_loss(pooled, head, jnp.asarray(labels))
    if problem_type == "regression" and count == 1 and labels.shape == (batch,):
        labels = labels[:, None]
    kind = "floats" if problem_type == "multi_label_classification" else "numbers"
    is_kind = jnp.issubdtype(labels.dtype, jnp.floating) or (kind == "numbers" and integers)
    if labels.shape != (batch, count) or not is_kind:
        raise ValueError(
            f"labels: found {labels.dtype}{list(labels.shape)}, expected {kind} {[batch, count]} "
            f"for {problem_type}"
        )
    logits = wide_logits(pooled, head)
    targets = jnp.asarray(labels).astype(logits.dtype)
    if problem_type == "regression":
        return jnp.mean(jnp.square(logits - targets))
    return jnp.mean((1 - targets) * logits + jax.nn.softplus(-logits))
