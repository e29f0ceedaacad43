"""The model in a state dict, in torchtitan's or Hugging Face's names, whatever is stored beside it.

A trainer's tree has the model at the top, beside its optimizer, or under keys of its own ("model.",
"app.model."). torchtitan's names are Meta's, and so is the order of its rotated rows. Its version 0.3 has
`attention.qkv_linear.wq` and `lm_head`, versions before it `attention.wq` and `output`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from convert.formats.llama_tensors import renamed
from llama_jax.checkpoints.names import without_wrappers

# Hugging Face's -> torchtitan's
_MODULES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "lm_head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
_FROM_TITAN = {titan.replace(".qkv_linear", ""): ours for ours, titan in _MODULES.items()}
_FROM_TITAN["output"] = "lm_head"
_EMBEDDING = re.compile(r"(?P<outer>(?:\w+\.)*?)(tok_embeddings|(model\.)?embed_tokens)\.weight")
_TITAN_EMBEDDING = "tok_embeddings.weight"
_ROOTS = ("model.", "lm_head.", "embed_tokens.", "layers.", "norm.", "tok_embeddings.", "output.")
_BUFFERS = ("freqs_cis", "rope.cache", "rope.freqs")
_TITAN_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ModelNames:
    """Which of the stored tensors are the model's."""

    names: dict[str, str]
    """Stored name -> Hugging Face's. Of a tensor that no Llama has, the stored one."""
    pairs: bool
    """Whether rotated rows are in Meta's order, as torchtitan has them."""
    prefix: str
    """Of the stored names, beyond the model's own; "" if there is none."""


def titan_name(name: str) -> str:
    """What torchtitan calls a tensor.

    >>> titan_name("model.layers.3.self_attn.q_proj.weight")
    'layers.3.attention.qkv_linear.wq.weight'
    """
    return renamed(name, _MODULES, layers="layers")


def model_names(stored: Iterable[str]) -> ModelNames:
    """Find the model among stored names.

    Raises:
        ValueError: names of which no model, or more than one, can be made.
    """
    short = {name: without_wrappers(name) for name in stored}
    found = {m["outer"]: m[0] for m in map(_EMBEDDING.fullmatch, short.values()) if m}
    if len(found) != 1:
        if found:
            raise ValueError(
                f"holds {len(found)} models, {', '.join(sorted(found.values())[:5])}; expected one: save "
                "the one that is meant alone"
            )
        kept = sorted(short)
        raise ValueError(
            f"holds no Llama: expected tok_embeddings.weight or model.embed_tokens.weight among its "
            f"{len(kept)} tensors ({', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''})"
        )
    ((outer, embedding),) = found.items()
    pairs = embedding.endswith(_TITAN_EMBEDDING)
    names: dict[str, str] = {}
    seen: set[str] = set()
    twice = []
    for name, inner in short.items():
        inner = inner.removeprefix(outer) if inner.startswith(outer) else ""
        if not inner.startswith(_ROOTS) or inner.endswith(_BUFFERS):
            continue
        ours = _from_titan(inner) if pairs else inner
        if ours in seen:
            twice.append(f"{name}: another tensor is {ours} too")
        seen.add(ours)
        names[name] = ours
    if twice:
        raise ValueError("; ".join(twice[:5]))
    return ModelNames(names, pairs, outer)


def _from_titan(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if match := _TITAN_LAYER.fullmatch(module):
        inner = _FROM_TITAN.get(match[2].replace(".qkv_linear", ""))
        return name if inner is None else f"model.layers.{match[1]}.{inner}.{kind}"
    ours = _FROM_TITAN.get(module)
    return name if ours is None else f"{ours}.{kind}"
