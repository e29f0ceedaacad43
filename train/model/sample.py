"""Generate a sample of text."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.text.detokenize import continuation_text
from llama_jax.text.tokenizer import load_tokenizer


def sample_text(
    model: LlamaForCausalLM,
    tokenizer: Path,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
) -> str:
    """The prompt and its continuation.

    Args:
        tokenizer: a directory with a tokenizer.
        temperature: divides the logits, from whose 50 likeliest tokens the next one is drawn; 0: the
            likeliest token. The random numbers are always the same.

    Raises:
        ValueError: the tokenizer is missing or damaged.
    """
    encoder = load_tokenizer(tokenizer)
    ids = encoder.encode(prompt, add_special_tokens=False).ids or [0]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        return prompt
    drawn = {"do_sample": True, "temperature": temperature, "key": jax.random.key(0)}
    how: dict[str, Any] = drawn if temperature else {"do_sample": False}
    out = model.generate(jnp.asarray([ids]), max_new_tokens=min(max_new_tokens, room), **how)
    return prompt + continuation_text(encoder, ids, np.asarray(out)[0, len(ids) :].tolist())
