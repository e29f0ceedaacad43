"""LlamaForCausalLM: the decoder with a language-model head."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from llama_jax.attention.cache import KVCache
from llama_jax.attention.implementation import Implementation
from llama_jax.config import LlamaConfig
from llama_jax.generation import loop
from llama_jax.generation.config import GENERATION_FILE, GenerationConfig, read_generation_config
from llama_jax.generation.loop import GenerateOutput, Request
from llama_jax.generation.prompt_cache import PromptCache
from llama_jax.generation.sampling import LogitsProcessor, Sampling
from llama_jax.inputs.labels import require_labels
from llama_jax.inputs.positions import as_array, keep_positions
from llama_jax.loss import fused_linear_cross_entropy, shift_labels
from llama_jax.models.decoder import Embeddings, LlamaModel, Positions, Tokens
from llama_jax.models.layers import Linear, step_matmul
from llama_jax.models.pretrained import PretrainedModel
from llama_jax.numerics.matmul import einsum, working_dtype
from llama_jax.numerics.remat_policy import Kept, Remat
from llama_jax.numerics.scalars import integers
from llama_jax.quantization.weight import QuantizedWeight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalLMOutput:
    """What `LlamaForCausalLM` returns. Optional fields are None unless requested.

    Attributes:
        logits: [batch, kept, vocab]; all positions are kept unless `logits_to_keep` says otherwise.
        loss: with `labels`.
        cache: with `cache`, extended by this call's keys and values.
        hidden_states: with `output_hidden_states`, see `ModelOutput`.
        attentions: with `output_attentions`, the weights of each layer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
        >>> ids = jnp.array([[5, 6, 7]])
        >>> out = model(ids, labels=ids)
        >>> out.logits.shape, out.loss.shape, out.cache
        ((1, 3, 32), (), None)
    """

    logits: Float[Array, "batch kept vocab"]
    loss: Float[Array, ""] | None = None
    cache: KVCache | None = None
    hidden_states: tuple[Float[Array, "batch seq hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads seq k"], ...] | None = None


class LlamaForCausalLM(PretrainedModel):
    """Llama with a language-model head, tied to the embedding if the config says so.

    The model is a pytree: `jax.jit(lambda model, ids: model(ids).logits)`, `jax.grad` and optax work on it
    directly. The dtype of the weights is the dtype of the computation.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
        >>> ids = jnp.array([[5, 6, 7]])
        >>> model(ids).logits.shape
        (1, 3, 32)
        >>> gradient = jax.grad(lambda model: model(ids, labels=ids).loss)(model)
        >>> gradient.model.embed_tokens.weight.shape
        (32, 8)
        >>> model.save_pretrained("tiny")
        >>> loaded = LlamaForCausalLM.from_pretrained("tiny", dtype=jnp.bfloat16)
        >>> loaded.dtype
        dtype(bfloat16)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.generation_config = GenerationConfig.from_dict({}, config)
        self.model = LlamaModel(config, rngs=rngs, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size,
                config.vocab_size,
                ("vocab", "embed"),
                use_bias=False,
                slices=1,
                stddev=config.initializer_range,
                stack=(),
                dtype=jnp.dtype(dtype),
                rngs=rngs,
            )

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights and of the computation."""
        return self.model.dtype

    @property
    def head_weight(self) -> Float[Array, "vocab hidden"]:
        """The projection onto the vocabulary: of `lm_head`, or the embedding if tied."""
        weight: Float[Array, "vocab hidden"] = self._head().weight[...]
        return weight

    def _head(self) -> Any:
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def __call__(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Array | np.ndarray | None = None,
        position_ids: Positions | None = None,
        inputs_embeds: Embeddings | None = None,
        segment_ids: Tokens | None = None,
        labels: Array | np.ndarray | None = None,
        num_items_in_batch: float | Array | np.ndarray | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int | Array | np.ndarray = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_key: Key[Array, ""] | None = None,
        *,
        attention_implementation: Implementation | None = None,
        remat: Remat | Kept = "dots",
        scan_unroll: int = 1,
        reduce_dtype: DTypeLike | None = None,
    ) -> CausalLMOutput:
        """Logits and, with `labels`, the loss. See `LlamaModel.__call__` for the other arguments.

        Args:
            labels: [batch, seq], not shifted: position t predicts labels[t + 1]; -100 is ignored. The
                loss is computed from float32 logits.
            num_items_in_batch: divides the summed loss; default: the number of valid labels.
            logits_to_keep: 0 keeps all positions, N the last N, an integer array [kept] or [batch, kept]
                those positions. The loss is of the kept positions, too.

        Raises:
            ValueError: labels of another shape, dtype or range, or as `LlamaModel.__call__`.
        """
        decoded = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            cache=cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            dropout_key=dropout_key,
            attention_implementation=attention_implementation,
            remat=remat,
            scan_unroll=scan_unroll,
            reduce_dtype=reduce_dtype,
        )
        hidden = keep_positions(decoded.last_hidden_state, logits_to_keep)
        head = self.head_weight
        working = working_dtype(hidden.dtype)
        logits = self._step_logits(hidden) if hidden.shape[1] == 1 else None
        if logits is None:
            logits = einsum(
                "bsh,vh->bsv",
                hidden,
                head,
                out_dtype=working,
                blocked=hidden.shape[1] > 1,  # not a decoding step
                reduce_dtype=reduce_dtype,
            )
        loss = None
        if labels is not None:
            labels = as_array(labels)
            batch_and_seq = decoded.last_hidden_state.shape[:2]
            require_labels(labels, batch_and_seq, self.config.vocab_size)
            kept = keep_positions(shift_labels(jnp.asarray(labels)), logits_to_keep)
            loss = causal_lm_loss(hidden, head, kept, num_items_in_batch, reduce_dtype)
        return CausalLMOutput(
            logits=logits.astype(hidden.dtype),
            loss=loss,
            cache=decoded.cache,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )

    def _step_logits(
        self, hidden: Float[Array, "batch 1 hidden"]
    ) -> Float[Array, "batch 1 vocab"] | None:
        """Of a decoding step, where `step_matmul` has them."""
        weight = self._head().weight
        out = step_matmul(
            hidden[:, 0],
            weight if isinstance(weight, QuantizedWeight) else weight[...],
            working_dtype(hidden.dtype),
            is_head=True,
        )
        return None if out is None else out[:, None]

    def generate(
        self,
        input_ids: Tokens,
        attention_mask: Array | np.ndarray | None = None,
        *,
        max_new_tokens: int,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        key: Key[Array, ""] | None = None,
        cache_capacity: int | None = None,
        cache_dtype: DTypeLike | None = None,
        output_scores: bool = False,
    ) -> Int[Array, "batch total"] | GenerateOutput:
        """Continue every prompt, as `transformers.generate` does; returns prompts and continuations.

        A row ends with its first end-of-sequence token and is filled with `pad_token_id` until every row
        has ended or `max_new_tokens` are reached. Options that are None come from `generation_config`,
        which `from_pretrained` reads, and if it lacks them from transformers' defaults.

        It cannot be called under jit: it compiles its own programs, once per bucket of shapes.

        Args:
            input_ids: [batch, prompt]; prompts of different lengths are padded on the left.
            attention_mask: [batch, prompt], 1 for tokens and 0 for padding; None if there is no padding.
            max_new_tokens: upper limit of new tokens per row.
            do_sample: sample the next token; False takes the likeliest one. Default: the checkpoint's, or
                False.
            temperature: divides the logits, > 0. Default: the checkpoint's, or 1. This and the next three
                apply only when sampling.
            top_k: sample from the `top_k` likeliest tokens; 0 turns it off. Default: the checkpoint's, or
                50.
            top_p: sample from the smallest set of tokens with this probability, in (0, 1]. Default: the
                checkpoint's, or 1.
            min_p: drop tokens below this fraction of the largest probability, in [0, 1]. Default: the
                checkpoint's, or 0.
            repetition_penalty: divides positive logits of tokens that occurred before, and multiplies
                negative ones, > 0. Default: the checkpoint's, or 1.
            logits_processors: your own filters, applied after the repetition penalty and before the
                temperature. Each maps (ids [batch, slots], logits [batch, vocab], lengths [batch]) to new
                logits, under jit; the tokens of row r so far are ids[r, : lengths[r]], without padding.
            eos_token_id: the token, or tokens, that end a row; () for none. Default: the checkpoint's.
            pad_token_id: fills rows that have ended. Default: the checkpoint's, or the first
                end-of-sequence token, or 0.
            key: PRNG key, needed for sampling; the same key gives the same tokens.
            cache_capacity: slots of the key/value cache. Default: as many as needed.
            cache_dtype: of the key/value cache; int8 stores a scale per token and head. Default: the
                model's.
            output_scores: return `GenerateOutput` instead of the tokens alone.

        Returns:
            int32 [batch, prompt + new], or `GenerateOutput`.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, a mask of another shape, a cache that
                is too small, an option out of range, or sampling without a key.
            TypeError: an unknown keyword.

        Warns:
            UserWarning: padding on the right; more tokens than `max_position_embeddings`; fields of the
                checkpoint's generation config that are not implemented.

        Examples:
            >>> import jax
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from llama_jax import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(
            ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
            ...     num_attention_heads=2,
            ... )
            >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
            >>> prompt = jnp.array([[5, 6, 7]])
            >>> model.generate(prompt, max_new_tokens=4, eos_token_id=()).shape
            (1, 7)
            >>> key = jax.random.key(0)
            >>> model.generate(
            ...     prompt, max_new_tokens=4, do_sample=True, temperature=0.7, eos_token_id=(), key=key
            ... ).shape
            (1, 7)
        """
        request = self._request(
            self.generation_config.sampling(
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                logits_processors=logits_processors,
            ),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            key=key,
            cache_capacity=cache_capacity,
            cache_dtype=cache_dtype,
            output_scores=output_scores,
        )
        return loop.generate(self, *_as_arrays(input_ids, attention_mask), request)

    def stream(
        self,
        input_ids: Tokens,
        attention_mask: Array | np.ndarray | None = None,
        *,
        max_new_tokens: int,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        key: Key[Array, ""] | None = None,
        cache_capacity: int | None = None,
        cache_dtype: DTypeLike | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the new tokens of `generate` one step at a time, int32 [batch].

        Args:
            prompt_cache: of the earlier prompts of a conversation; what this one begins with like the last
                one and its continuation is not run again. For one prompt without padding. The other
                arguments are those of `generate`.

        Raises:
            ValueError: a `prompt_cache` with several prompts or padding, or as `generate`.
        """
        request = self._request(
            self.generation_config.sampling(
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                logits_processors=logits_processors,
            ),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            key=key,
            cache_capacity=cache_capacity,
            cache_dtype=cache_dtype,
        )
        return loop.stream(self, *_as_arrays(input_ids, attention_mask), request, prompt_cache)

    def _request(
        self,
        sampling: Sampling,
        *,
        eos_token_id: int | Sequence[int] | None,
        pad_token_id: int | None,
        **options: Any,
    ) -> Request:
        """The arguments of `generate` with the checkpoint's defaults."""
        config = self.generation_config
        if config.unimplemented:
            warnings.warn(
                f"{GENERATION_FILE}: {config.unimplemented} is not implemented", stacklevel=3
            )
        return Request(
            sampling=sampling,
            eos_token_ids=config.eos_token_ids if eos_token_id is None else integers(eos_token_id),
            pad_token_id=config.pad_token_id if pad_token_id is None else pad_token_id,
            **options,
        )

    def _read_json_files(self, directory: Path) -> None:
        self.generation_config = read_generation_config(directory, self.config)

    def _json_files(self) -> dict[str, Any]:
        fields = self.generation_config.fields
        return {GENERATION_FILE: fields} if fields else {}


def _as_arrays(ids: Any, mask: Any) -> tuple[Array | np.ndarray, Array | np.ndarray | None]:
    # what is not there yet does not become JAX's, which compiles a program for every shape
    ids, mask = (
        values if isinstance(values, jax.Array | None) else np.asarray(values)
        for values in (ids, mask)
    )
    return ids, mask


def causal_lm_loss(
    hidden: Float[Array, "batch kept hidden"],
    head: Float[Array, "vocab hidden"],
    labels: Int[Array, "batch kept"],
    num_items_in_batch: float | Array | np.ndarray | None,
    reduce_dtype: DTypeLike | None = None,
) -> Float[Array, ""]:
    """The loss of shifted labels without holding the logits, averaged over valid labels or items."""
    if num_items_in_batch is None:
        return fused_linear_cross_entropy(
            hidden, head, labels, vocab_axis=0, reduce_dtype=reduce_dtype
        ).loss
    items = jnp.asarray(num_items_in_batch)
    if items.size != 1:
        raise ValueError(f"num_items_in_batch: found shape {items.shape}, expected one number")
    divisor = items.reshape(())
    return fused_linear_cross_entropy(
        hidden,
        head,
        labels,
        vocab_axis=0,
        reduction="sum",
        loss_div_factor=divisor,
        reduce_dtype=reduce_dtype,
    ).loss
