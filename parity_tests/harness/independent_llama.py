"""A Llama in plain JAX that shares nothing with llama_jax, to try traces of other people's programs on.

Layers are a list, kernels are [in, out], queries, keys and values are one kernel, gate and up another.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Config = dict[str, Any]
Params = dict[str, Any]


def params_of(config: Config, weights: dict[str, np.ndarray], dtype: Any) -> Params:
    """The program's parameters from a Hugging Face checkpoint's tensors."""

    def get(name: str) -> jax.Array:
        return jnp.asarray(np.asarray(weights[name]), dtype)

    def layer(prefix: str) -> Params:
        attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = [get(f"{attn}.{p}_proj.weight").T for p in "qkv"]
        return {
            "norm1": get(f"{prefix}.input_layernorm.weight"),
            "qkv": jnp.concatenate(qkv, axis=1),
            "out": get(f"{attn}.o_proj.weight").T,
            "norm2": get(f"{prefix}.post_attention_layernorm.weight"),
            "gate_up": jnp.stack([get(f"{mlp}.{p}_proj.weight").T for p in ("gate", "up")], axis=1),
            "down": get(f"{mlp}.down_proj.weight").T,
        }

    params = {
        "table": get("model.embed_tokens.weight"),
        "layers": [layer(f"model.layers.{i}") for i in range(config["num_hidden_layers"])],
        "norm": get("model.norm.weight"),
    }
    if "lm_head.weight" in weights:
        params["head"] = get("lm_head.weight").T
    return params


def to_hugging_face(config: Config, params: Params) -> dict[str, jax.Array]:
    """The reverse of `params_of`."""
    query, key, _ = sizes(config)
    tensors = {"model.embed_tokens.weight": params["table"], "model.norm.weight": params["norm"]}
    if "head" in params:
        tensors["lm_head.weight"] = params["head"].T
    for index, layer in enumerate(params["layers"]):
        prefix = f"model.layers.{index}"
        q, k, v = jnp.split(layer["qkv"], (query, query + key), axis=1)
        tensors |= {
            f"{prefix}.input_layernorm.weight": layer["norm1"],
            f"{prefix}.self_attn.q_proj.weight": q.T,
            f"{prefix}.self_attn.k_proj.weight": k.T,
            f"{prefix}.self_attn.v_proj.weight": v.T,
            f"{prefix}.self_attn.o_proj.weight": layer["out"].T,
            f"{prefix}.post_attention_layernorm.weight": layer["norm2"],
            f"{prefix}.mlp.gate_proj.weight": layer["gate_up"][:, 0].T,
            f"{prefix}.mlp.up_proj.weight": layer["gate_up"][:, 1].T,
            f"{prefix}.mlp.down_proj.weight": layer["down"].T,
        }
    return tensors


def names(config: Config) -> dict[str, Any]:
    """The program's names of arrays, for `record_jax`."""
    query, key, _ = sizes(config)
    layer = "model.layers.{layer}"

    def of_qkv(array: jax.Array) -> dict[str, jax.Array]:
        parts = jnp.split(array, (query, query + key), axis=-1)
        outputs = (f"{layer}.self_attn.{p}_proj.output" for p in "qkv")
        return dict(zip(outputs, parts, strict=True))

    def of_gate_up(array: jax.Array) -> dict[str, jax.Array]:
        return {
            f"{layer}.mlp.gate_proj.output": array[..., 0, :],
            f"{layer}.mlp.up_proj.output": array[..., 1, :],
        }

    return {
        "embedded": "model.embed_tokens.output",
        "block{layer}.normed": f"{layer}.input_layernorm.output",
        "block{layer}.qkv": of_qkv,
        "block{layer}.q": f"{layer}.self_attn.rotate.q.output",
        "block{layer}.k": f"{layer}.self_attn.rotate.k.output",
        "block{layer}.mixed": f"{layer}.self_attn.o_proj.input",
        "block{layer}.attended": f"{layer}.self_attn.o_proj.output",
        "block{layer}.middle": f"{layer}.post_attention_layernorm.input",
        "block{layer}.normed2": f"{layer}.post_attention_layernorm.output",
        "block{layer}.gate_up": of_gate_up,
        "block{layer}.act": f"{layer}.mlp.down_proj.input",
        "block{layer}.down": f"{layer}.mlp.down_proj.output",
        "block{layer}.end": f"{layer}.output",
        "normed": "model.norm.output",
        "logits": "lm_head.output",
    }


def sizes(config: Config) -> tuple[int, int, int]:
    """Features of all queries and of all keys, and of a head."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim, dim


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight[None, None]


def angles(length: int, dim: int, theta: float) -> jax.Array:
    """Of each position and pair, [T, D / 2]."""
    frequencies = jnp.float32(theta) ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None]


def rotate(x: jax.Array, turned_by: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, heads, D], whose pairs are D / 2 apart."""
    cos, sin = (f(turned_by).astype(x.dtype)[None, :, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of q [B, T, N, D] to k, v [B, T, K, D]."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnd,bsnd->bnts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    shares = jax.nn.softmax(jnp.where(seen[None, None], scores, -1e30), axis=-1).astype(q.dtype)
    return jnp.einsum("bnts,bsnd->btnd", shares, v)


def block(config: Config, layer: Params, index: int, x: jax.Array) -> jax.Array:
    """One layer."""
    query, key, dim = sizes(config)
    eps = config["rms_norm_eps"]

    def named(array: jax.Array, name: str) -> jax.Array:
        return checkpoint_name(array, f"block{index}.{name}")

    qkv = named(named(norm(x, layer["norm1"], eps), "normed") @ layer["qkv"], "qkv")
    heads = (*x.shape[:2], -1, dim)
    q, k, v = (part.reshape(heads) for part in jnp.split(qkv, (query, query + key), axis=-1))
    turned_by = angles(x.shape[1], dim, config["rope_theta"])
    q, k = named(rotate(q, turned_by), "q"), named(rotate(k, turned_by), "k")
    mixed = named(mix(q, k, v).reshape(*x.shape[:2], -1), "mixed")
    x = named(x + named(mixed @ layer["out"], "attended"), "middle")
    normed = named(norm(x, layer["norm2"], eps), "normed2")
    gate_up = named(jnp.einsum("bth,hci->btci", normed, layer["gate_up"]), "gate_up")
    act = named(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :], "act")
    return named(x + named(act @ layer["down"], "down"), "end")


def loss(config: Config, params: Params, ids: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token."""
    x = checkpoint_name(params["table"][ids], "embedded")
    for index, layer in enumerate(params["layers"]):
        x = block(config, layer, index, x)
    x = checkpoint_name(norm(x, params["norm"], config["rms_norm_eps"]), "normed")
    head = params["head"] if "head" in params else params["table"].T
    logits = checkpoint_name(x @ head, "logits").astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    return -jnp.mean(chosen)
