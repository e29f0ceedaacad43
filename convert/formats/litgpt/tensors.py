"""The tensors of a LitGPT checkpoint: their names, and the order of rows in the fused projection."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from convert.formats.llama_tensors import renamed
from llama_jax.config import LlamaConfig

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
FUSED, FUSED_BY_GROUP = "attn.qkv", "attn.attn"
_MODULES = {  # Hugging Face's -> LitGPT's
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.q_proj": FUSED,
    "self_attn.k_proj": FUSED,
    "self_attn.v_proj": FUSED,
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}


class Place(NamedTuple):
    """Where a tensor is."""

    name: str
    """LitGPT's."""
    part: int | None
    """0, 1 or 2: queries, keys or values of a fused tensor."""


def place_of(name: str) -> Place:
    """Where the tensor is that Hugging Face calls `name`.

    >>> place_of("model.layers.3.self_attn.k_proj.weight")
    Place(name='transformer.h.3.attn.qkv.weight', part=1)
    """
    parts = (".q_proj.", ".k_proj.", ".v_proj.")
    part = next((number for number, each in enumerate(parts) if each in name), None)
    return Place(renamed(name, _MODULES, layers="transformer.h"), part)


def part_of(
    fused: Shaped[np.ndarray, "rows ..."], part: int, config: LlamaConfig, *, by_group: bool
) -> Shaped[np.ndarray, "part ..."]:
    """The queries, keys or values of a fused tensor.

    Args:
        part: 0, 1 or 2.
        by_group: whether each group's queries, key and value follow each other.

    >>> config = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2)
    >>> part_of(np.arange(16), 1, config, by_group=True)
    array([ 4,  5, 12, 13])
    """
    heads, groups, size = config.num_attention_heads, config.kv_heads, config.head_size
    each = heads // groups if by_group else heads
    ends = (each, each + 1, each + 2) if by_group else (heads, heads + groups, heads + 2 * groups)
    rows = slice(ends[part - 1] * size if part else 0, ends[part] * size)
    if not by_group:
        return fused[rows]
    by_groups = fused.reshape(groups, -1, *fused.shape[1:])[:, rows]
    return by_groups.reshape(-1, *fused.shape[1:])
