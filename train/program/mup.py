"""Maximal update parametrization (muP, arXiv:2203.03466): initial values and learning rates by width.

With them the learning rate that is best for a narrow model, the base, is about the best for a wide one. The
paper has multipliers in the model: on attention's logits, and on the output of a tied head. Here they are
part of the weights, which computes the same function (the paper's lemma J.1: a factor f before a matrix
may become one of f in its initial values and of f in Adam's learning rate). So the model is a plain Llama.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import keystr

from llama_jax.config import LlamaConfig
from train.options import ModelOptions, Optimizer

OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "muon")


class Scale(NamedTuple):
    """Factors on a parameter's initial values and on the update that the learning rate multiplies."""

    initial: float = 1.0
    update: float = 1.0


def base_config(options: ModelOptions, config: LlamaConfig) -> LlamaConfig | None:
    """The model of the base widths of `config`; None for the standard parametrization.

    What the options do not say is in proportion to the hidden size; the size of a head is the model's.

    Raises:
        ValueError: widths that are not those of a model, or of none in proportion.
    """
    if options.parametrization == "standard":
        return None
    hidden = options.mup_base_hidden_size
    if hidden is None:
        raise ValueError(
            "model.mup-base-hidden-size: found none with --model.parametrization mup, expected the hidden "
            "size at which the learning rate was chosen"
        )

    def in_proportion(option: str, numerator: int, denominator: int, of: str) -> int:
        if numerator % denominator:
            raise ValueError(
                f"model.mup-base-{option}: found none, and {of} is not a whole number: give it"
            )
        return numerator // denominator

    head_dim = options.mup_base_head_dim or config.head_size
    intermediate = options.mup_base_intermediate_size or in_proportion(
        "intermediate-size",
        config.intermediate_size * hidden,
        config.hidden_size,
        f"{config.intermediate_size} x {hidden} / {config.hidden_size}",
    )
    heads = options.mup_base_heads or in_proportion(
        "heads",
        config.num_attention_heads * config.head_size * hidden,
        config.hidden_size * head_dim,
        f"{config.num_attention_heads} heads of {config.head_size} x {hidden} / {config.hidden_size} / "
        f"{head_dim}",
    )
    kv_heads = options.mup_base_kv_heads or in_proportion(
        "kv-heads",
        config.kv_heads * heads,
        config.num_attention_heads,
        f"{config.kv_heads} x {heads} / {config.num_attention_heads}",
    )
    if heads % kv_heads:
        raise ValueError(
            f"model.mup-base-kv-heads: found {kv_heads}, expected a divisor of the base's {heads} heads"
        )
    if head_dim % 2:
        raise ValueError(f"model.mup-base-head-dim: found {head_dim}, expected an even number")
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )


def mup_scales(
    config: LlamaConfig, base: LlamaConfig, optimizer: Optimizer, *, zero_head: bool = False
) -> dict[str, Scale]:
    """The scale of every parameter that has another than 1, by its name.

    Of matrices [out, in] whose input has m times the base's width:

    - in the layers, initial values 1/sqrt(m) and Adam's updates 1/m (tables 3 and 8 of arXiv:2203.03466).
      Muon's update has spectral norm 0.2 sqrt(max(out, in)), and must have one in proportion to
      sqrt(out / in) (condition 1 of arXiv:2310.17813);
    - the head, with Adam in both, 1/m and 1/m. A tied head must be initialized and updated as the
      embedding is, with 1 and 1; the norm before it, on whose weights it also depends, has the factor;
    - queries also have sqrt(base head / head), which makes the scale of attention sqrt(base head) / head
      instead of 1 / sqrt(head).

    The embedding, the other norms and biases are as in the base.

    Args:
        zero_head: the head begins at 0, as the paper recommends (its appendix D.2).

    Raises:
        ValueError: `zero_head` with tied embeddings.
    """
    if zero_head and config.tie_word_embeddings:
        raise ValueError(
            "model.mup-zero-head: found it for a model with tied embeddings, whose head is the embedding: "
            "leave it out"
        )
    hidden = config.hidden_size / base.hidden_size
    attention = math.sqrt(base.head_size / config.head_size)
    scales = {
        "model.layers.self_attn.q_proj.bias": Scale(1.0, attention),
        "model.norm.weight" if config.tie_word_embeddings else "lm_head.weight": Scale(
            0.0 if zero_head else 1 / hidden, 1 / hidden
        ),
    }
    base_shapes = _layer_shapes(base)
    for name, (rows, columns) in _layer_shapes(config).items():
        base_rows, base_columns = base_shapes[name]
        wider = columns / base_columns
        initial, update = 1 / math.sqrt(wider), 1 / wider
        if optimizer == "muon":
            update = math.sqrt(rows / base_rows / wider)
            update *= math.sqrt(max(base_rows, base_columns) / max(rows, columns))
        factor = attention if name == "self_attn.q_proj" else 1.0
        scales[f"model.layers.{name}.weight"] = Scale(initial * factor, update * factor)
    return {name: scale for name, scale in scales.items() if scale != Scale()}


def _layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices of a layer."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_size
    kv_heads = config.kv_heads * config.head_size
    return {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def scale_by_name(tree: Any, factors: Mapping[str, float]) -> Any:
    """The tree with the leaves named in `factors` multiplied by theirs; the others are left as they are."""

    def scale(path: tuple[Any, ...], leaf: Any) -> Any:
        factor = factors.get(keystr(path, simple=True, separator="."), 1.0)
        return leaf if factor == 1 else leaf * factor

    return jax.tree_util.tree_map_with_path(scale, tree)


def scale_updates(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """An update rule that multiplies the updates of the parameters named in `factors`."""
    return optax.stateless(lambda updates, params: scale_by_name(updates, factors))
