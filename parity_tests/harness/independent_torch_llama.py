"""A Llama in torch with Meta's names and Meta's order of rotary features, to try recordings on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden = config["hidden_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or hidden // self.heads
        self.theta = config["rope_theta"]
        self.wq = nn.Linear(hidden, self.heads * self.dim, bias=False)
        self.wk = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.wv = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.wo = nn.Linear(self.heads * self.dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, -1, self.dim) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q), self.rotate(k)
        group = self.heads // self.kv_heads
        k, v = (part.repeat_interleave(group, dim=2) for part in (k, v))
        mixed = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return self.wo(mixed.transpose(1, 2).reshape(batch, length, -1))

    def rotate(self, x: Tensor) -> Tensor:
        """Pairs of neighbours are complex numbers."""
        powers = torch.arange(0, self.dim, 2).float() / self.dim
        angles = torch.outer(torch.arange(x.shape[1]).float(), self.theta**-powers)
        turned = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turned).flatten(-2).type_as(x)


class FeedForward(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = Norm(hidden, eps), Norm(hidden, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.output = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "model.": "",
}


def from_hugging_face(config: dict[str, Any], weights: dict[str, Tensor]) -> Transformer:
    """The model of a Hugging Face checkpoint's tensors; q and k get Meta's order of rows."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    state = {}
    for name, tensor in weights.items():
        if ".q_proj." in name or ".k_proj." in name:
            halves = tensor.unflatten(0, (-1, 2, dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    if "output.weight" not in state:
        state["output.weight"] = state["tok_embeddings.weight"]
    model = Transformer(config)
    model.load_state_dict(state, strict=True)
    return model.eval()
