"""The names of what is computed within a decoder layer."""

from collections.abc import Callable
from typing import Any

OUTPUT = ""  # a layer's output has the layer's name and none of its own

# The intermediates of a decoder layer in forward order, by the names of Hugging Face's modules.
LAYER_STEPS = (
    "input_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkv"),
    "self_attn.rotate.q",
    "self_attn.rotate.k",
    "self_attn.attention",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.act",
    "mlp.down_proj",
    OUTPUT,
)

AFTER_ATTENTION = "after_attention"  # the residual stream between attention and MLP

Read = Callable[[str, Any], Any]
"""Called with the name and the value of every step, and of `AFTER_ATTENTION`: what later steps read."""


def as_computed(name: str, value: Any) -> Any:
    """Later steps read what earlier ones computed."""
    return value
