"""A sample of the model's text."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llama_jax.causal_lm import LlamaForCausalLM
from llama_jax.tokenizer import load_tokenizer


def sample_text(model: LlamaForCausalLM, tokenizer: Path, prompt: str, max_new_tokens: int) -> str:
    """The prompt and its greedy continuation.

    Args:
        tokenizer: the directory of the tokenizer.
    """
    encoder = load_tokenizer(tokenizer)
    ids = encoder.encode(prompt, add_special_tokens=False).ids or [0]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        return prompt
    out = model.generate(jnp.asarray([ids]), max_new_tokens=min(max_new_tokens, room))
    return prompt + encoder.decode(np.asarray(out)[0, len(ids) :].tolist())
