"""Generate a sample of text."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.text.detokenize import continuation_text
from llama_jax.text.tokenizer import load_tokenizer


def sample_text(model: LlamaForCausalLM, tokenizer: Path, prompt: str, max_new_tokens: int) -> str:
    """The prompt and its greedy continuation.

    Args:
        tokenizer: a directory with a tokenizer.

    Raises:
        ValueError: the tokenizer is missing or damaged.
    """
    encoder = load_tokenizer(tokenizer)
    ids = encoder.encode(prompt, add_special_tokens=False).ids or [0]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        return prompt
    out = model.generate(jnp.asarray([ids]), max_new_tokens=min(max_new_tokens, room))
    return prompt + continuation_text(encoder, ids, np.asarray(out)[0, len(ids) :].tolist())
