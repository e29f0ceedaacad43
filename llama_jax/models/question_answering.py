"""LlamaForQuestionAnswering: where in the text the answer starts and ends."""

from dataclasses import dataclass
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llama_jax.attention.cache import KVCache
from llama_jax.config import LlamaConfig
from llama_jax.inputs.positions import as_array
from llama_jax.models.decoder import DecoderOptions, Embeddings, LlamaModel, Positions, Tokens
from llama_jax.models.pretrained import PretrainedModel
from llama_jax.models.task_head import task_head, wide_logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuestionAnsweringModelOutput:
    """What `LlamaForQuestionAnswering` returns; see `CausalLMOutput` for the optional fields.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForQuestionAnswering
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2
        ... )
        >>> model = LlamaForQuestionAnswering(config, rngs=nnx.Rngs(0))
        >>> start, end = jnp.array([1]), jnp.array([2])
        >>> out = model(jnp.array([[5, 6, 7]]), start_positions=start, end_positions=end)
        >>> out.start_logits.shape, out.end_logits.shape, out.loss.shape
        ((1, 3), (1, 3), ())
    """

    start_logits: Float[Array, "batch seq"]
    end_logits: Float[Array, "batch seq"]
    loss: Float[Array, ""] | None = None
    cache: KVCache | None = None
    hidden_states: tuple[Float[Array, "batch seq hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads seq k"], ...] | None = None


class LlamaForQuestionAnswering(PretrainedModel):
    """Llama with two scores per token, as the start and as the end of the answer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForQuestionAnswering
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2
        ... )
        >>> model = LlamaForQuestionAnswering(config, rngs=nnx.Rngs(0))
        >>> out = model(jnp.array([[5, 6, 7]]))
        >>> out.start_logits.shape, out.end_logits.shape
        ((1, 3), (1, 3))
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        # transformers' name; only this class has it
        self.transformer = LlamaModel(config, rngs=rngs, dtype=dtype)
        self.qa_outputs = task_head(config, 2, use_bias=True, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights and of the computation."""
        return self.transformer.dtype

    def __call__(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Array | np.ndarray | None = None,
        position_ids: Positions | None = None,
        inputs_embeds: Embeddings | None = None,
        segment_ids: Tokens | None = None,
        start_positions: Array | np.ndarray | None = None,
        end_positions: Array | np.ndarray | None = None,
        **options: Unpack[DecoderOptions],
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits of every token and, with both positions, their mean cross-entropy.

        Args:
            start_positions: integers [batch] or [batch, 1]. As in transformers, negative ones count as 0,
                and those beyond the sequence are ignored (a loss of 0 where all are).
            end_positions: as `start_positions`.
            options: the other arguments of `LlamaModel.__call__`.

        Raises:
            ValueError: one position without the other, another shape or dtype, or as
                `LlamaModel.__call__`.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("pass both start_positions and end_positions, or neither")
        decoded = self.transformer(
            input_ids, attention_mask, position_ids, inputs_embeds, segment_ids, **options
        )
        hidden = decoded.last_hidden_state
        start, end = jnp.moveaxis(wide_logits(hidden, self.qa_outputs), -1, 0)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (
                _position_loss(start, as_array(start_positions), "start_positions")
                + _position_loss(end, as_array(end_positions), "end_positions")
            ) / 2
        return QuestionAnsweringModelOutput(
            start_logits=start.astype(hidden.dtype),
            end_logits=end.astype(hidden.dtype),
            loss=loss,
            cache=decoded.cache,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )


def _position_loss(
    logits: Float[Array, "batch seq"], positions: Array | np.ndarray, name: str
) -> Float[Array, ""]:
    batch, seq = logits.shape
    if positions.shape not in ((batch,), (batch, 1)) or not jnp.issubdtype(
        positions.dtype, jnp.integer
    ):
        raise ValueError(
            f"{name}: found {positions.dtype}{list(positions.shape)}, expected integers {[batch]}"
        )
    position = jnp.clip(jnp.asarray(positions).reshape(batch), 0, seq)
    within = position < seq
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    index = jnp.where(within, position, 0)[:, None]
    target = jnp.take_along_axis(log_probabilities, index, axis=-1)[:, 0]
    count = jnp.maximum(jnp.sum(within, dtype=jnp.int32), 1).astype(logits.dtype)
    return -jnp.sum(jnp.where(within, target, 0)) / count
