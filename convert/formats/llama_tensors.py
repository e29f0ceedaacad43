"""The tensors of a Llama by Hugging Face's names: shapes, names in other formats, order of rows.

What readers and writers of formats with other names and another order of rows share. RoPE rotates pairs of
a head's features. Hugging Face pairs feature i with i + D/2, Meta and llama.cpp pair 2i with 2i + 1; so the
rows (2, D/2) of a head's query or key projection in the one are (D/2, 2) in the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped

from llama_jax.config import LlamaConfig
from llama_jax.files.buffers import empty


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, in the model's order; a tied head is not among them.

    >>> shapes = tensor_shapes(LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16))
    >>> shapes["model.layers.0.self_attn.q_proj.weight"]
    (64, 64)
    """
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_attention_heads * config.head_size
    keys = config.kv_heads * config.head_size
    projections = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for module, shape in projections.items():
            shapes[f"{layer}.{module}.weight"] = shape
            if config.attention_bias if module.startswith("self_attn.") else config.mlp_bias:
                shapes[f"{layer}.{module}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def renamed(name: str, modules: Mapping[str, str], layers: str) -> str:
    """A tensor's name in another format.

    Args:
        modules: the other format's names of `model.embed_tokens`, `self_attn.q_proj` and so on.
        layers: what stands there for `model.layers`.

    >>> renamed("model.layers.3.self_attn.q_proj.weight", {"self_attn.q_proj": "attn_q"}, "blk")
    'blk.3.attn_q.weight'
    """
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, number, inner = module.split(".", 3)
        return f"{layers}.{number}.{modules[inner]}.{kind}"
    return f"{modules[module]}.{kind}"


def rotary_heads(name: str, config: LlamaConfig) -> int:
    """How many heads' rows in a tensor are paired by RoPE; 0 for a tensor that it does not rotate.

    Queries have as many heads as the model, keys only as many as there are key/value heads.
    """
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.kv_heads if ".k_proj." in name else 0


def to_halves(values: Shaped[np.ndarray, "rows ..."], heads: int) -> Shaped[np.ndarray, "rows ..."]:
    """Rows in the order of Meta and llama.cpp put into Hugging Face's; 0 heads: unchanged.

    >>> to_halves(np.arange(6), heads=1)
    array([0, 2, 4, 1, 3, 5])
    """
    if not heads:
        return values
    return _swapped(values, (heads, -1, 2))


def to_pairs(values: Shaped[np.ndarray, "rows ..."], heads: int) -> Shaped[np.ndarray, "rows ..."]:
    """Rows in Hugging Face's order put into that of Meta and llama.cpp; 0 heads: unchanged.

    >>> to_pairs(np.arange(6), heads=1)
    array([0, 3, 1, 4, 2, 5])
    """
    if not heads:
        return values
    return _swapped(values, (heads, 2, -1))


def _swapped(values: np.ndarray, rows: tuple[int, int, int]) -> np.ndarray:
    """Rows of shape `rows` with the last two axes of these swapped."""
    swapped = values.reshape(*rows, *values.shape[1:]).swapaxes(1, 2)
    result = empty(values.shape, values.dtype)
    result.reshape(swapped.shape)[...] = swapped
    return result
