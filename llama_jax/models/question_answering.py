"""LlamaForQuestionAnswering: where in the text an answer starts and ends."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from llama_jax.attention.cache import KVCache
from llama_jax.config import LlamaConfig
from llama_jax.inputs.positions import as_array
from llama_jax.models.decoder import Embeddings, LlamaModel, Positions, Tokens
from llama_jax.models.pretrained import PretrainedModel
from llama_jax.models.task_head import task_head, wide_logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuestionAnsweringModelOutput:
    """What `LlamaForQuestionAnswering` returns; fields not asked for are None."""

    start_logits: Float[Array, "batch seq"]
    end_logits: Float[Array, "batch seq"]
    loss: Float[Array, ""] | None = None
    cache: KVCache | None = None
    hidden_states: tuple[Float[Array, "batch seq hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads seq k"], ...] | None = None


class LlamaForQuestionAnswering(PretrainedModel):
    """Llama with a score of each token as the start and as the end of the answer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        # transformers' name, in this class alone
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
        **options: Any,
    ) -> QuestionAnsweringModelOutput:
        """Logits of start and end over the tokens and, with both positions, their mean cross-entropy.

        Args:
            start_positions: integers [batch] or [batch, 1]. As in transformers, negative ones count as 0,
                and those beyond the sequence are ignored (a loss of 0 where all are).
            end_positions: as `start_positions`.
            options: the further arguments of `LlamaModel.__call__`.

        Raises:
            ValueError: one position without the other, another shape or dtype, or as
                `LlamaModel.__call__`.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError(
                "start_positions, end_positions: found one of them, expected both or neither"
            )
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
    place = jnp.clip(jnp.asarray(positions).reshape(batch), 0, seq)
    within = place < seq
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    index = jnp.where(within, place, 0)[:, None]
    chosen = jnp.take_along_axis(log_probabilities, index, axis=-1)[:, 0]
    count = jnp.maximum(jnp.sum(within, dtype=jnp.int32), 1).astype(logits.dtype)
    return -jnp.sum(jnp.where(within, chosen, 0)) / count
