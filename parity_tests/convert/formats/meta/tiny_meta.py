"""Tiny checkpoints as Meta's code lays them out, and Meta's computation on them, in plain torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from transformers import LlamaForCausalLM

Tensors = dict[str, torch.Tensor]

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def meta_tensors(model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> Tensors:
    """A model's weights under Meta's names: rows 0, D/2, 1, D/2 + 1, ... of each query and key head."""
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }
    result = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        inner = module.split(".", 3)[-1] if ".layers." in module else module
        if (count := heads.get(module.rpartition(".")[2])) is not None:
            size = tensor.shape[0] // count
            order = [i + j * size // 2 for i in range(size // 2) for j in range(2)]
            tensor = torch.cat([head[order] for head in tensor.split(size)])
        prefix = ".".join(module.split(".")[1:3]) + "." if ".layers." in module else ""
        result[f"{prefix}{NAMES[inner]}.weight"] = tensor.to(dtype).clone()
    return result


def split_tensors(
    tensors: Tensors, shards: int, *, kv_heads: int, embedding_axis: int = 0
) -> list[Tensors]:
    """What each model-parallel process of Meta's code would save."""
    result: list[Tensors] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module in ("wq", "w1", "w3", "output"):
            parts = tensor.chunk(shards, 0)
        elif module in ("wk", "wv"):
            copies = max(1, shards // kv_heads)
            parts = [p for p in tensor.chunk(shards // copies, 0) for _ in range(copies)]
        elif module in ("wo", "w2"):
            parts = tensor.chunk(shards, 1)
        elif module == "tok_embeddings":
            parts = tensor.chunk(shards, embedding_axis)
        else:
            parts = [tensor] * shards
        for shard, part in zip(result, parts, strict=True):
            shard[name] = part.clone()
    return result


def meta_params(model: LlamaForCausalLM, **extra: Any) -> dict[str, Any]:
    """The params.json of a model whose feed-forward layers are 2/3 of 4 dim, rounded up to 16."""
    config = model.config
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 16,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
    } | extra


def write_meta(path: Path, shards: list[Tensors], params: dict[str, Any]) -> Path:
    """A directory of Meta's."""
    path.mkdir()
    (path / "params.json").write_text(json.dumps(params))
    for i, shard in enumerate(shards):
        torch.save(shard, path / f"consolidated.{i:02d}.pth")
    return path


def meta_logits(tensors: Tensors, params: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits [seq, vocab] of token ids [seq], computed as Meta's `Transformer` does: complex rotations."""
    heads, kv_heads = params["n_heads"], params["n_kv_heads"]
    size, length = params["dim"] // heads, len(ids)
    frequencies = params["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    if params.get("use_scaled_rope"):
        turns = 8192 * frequencies / (2 * math.pi)
        smooth = ((turns - 1) / 3).clip(0, 1)
        frequencies = frequencies * ((1 - smooth) / params.get("rope_scaling_factor", 8) + smooth)
    angles = torch.arange(length).double()[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]

    def weight(name: str) -> torch.Tensor:
        return tensors[f"{name}.weight"].double()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + params["norm_eps"]).rsqrt() * weight(name)

    def rotated(x: torch.Tensor, count: int) -> torch.Tensor:
        pairs = torch.view_as_complex(x.view(length, count, size // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    x = weight("tok_embeddings")[ids]
    for i in range(params["n_layers"]):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.attention_norm")
        q = rotated(h @ weight(f"{layer}.attention.wq").T, heads)
        k = rotated(h @ weight(f"{layer}.attention.wk").T, kv_heads)
        v = (h @ weight(f"{layer}.attention.wv").T).view(length, kv_heads, size)
        k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ weight(f"{layer}.attention.wo").T
        h = norm(x, f"{layer}.ffn_norm")
        gate = functional.silu(h @ weight(f"{layer}.feed_forward.w1").T)
        x = (
            x
            + (gate * (h @ weight(f"{layer}.feed_forward.w3").T))
            @ weight(f"{layer}.feed_forward.w2").T
        )
    return norm(x, "norm") @ weight("output").T
