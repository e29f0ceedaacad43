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


def angles(positions: jax.Array, dim: int, theta: float) -> jax.Array:
    """Of positions [B or 1, T] and each pair, [B or 1, T, D / 2]."""
    frequencies = jnp.float32(theta) ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return positions.astype(jnp.float32)[..., None] * frequencies[None, None]


def rotate(x: jax.Array, turned_by: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, heads, D], whose pairs are D / 2 apart."""
    cos, sin = (f(turned_by).astype(x.dtype)[:, :, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def mask(length: int, segments: jax.Array | None) -> jax.Array:
    """Which query sees which key, [B or 1, T, T]."""
    seen = jnp.tril(jnp.ones((1, length, length), bool))
    return seen if segments is None else seen & (segments[:, :, None] == segments[:, None])


def mix(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Attention of q [B, T, N, D] to k, v [B, T, K, D]."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnd,bsnd->bnts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    shares = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1).astype(q.dtype)
    return jnp.einsum("bnts,bsnd->btnd", shares, v)


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """What the last kernel of the MLP reads."""
    return jax.nn.silu(gate) * up


def add(stream: jax.Array, branch: jax.Array) -> jax.Array:
    """The residual connection."""
    return stream + branch


def embed(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of tokens."""
    return table[ids]


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, T, in] times a kernel [in, out]."""
    return x @ kernel


def unembed(params: Params, x: jax.Array) -> jax.Array:
    """Logits."""
    return x @ (params["head"] if "head" in params else params["table"].T)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the labels that are not -100, each of the position before."""
    targets = labels[:, 1:]
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), jnp.maximum(targets, 0)[..., None], axis=-1
    )
    counts = (targets != -100).astype(jnp.float32)
    return -jnp.sum(chosen[..., 0] * counts) / jnp.sum(counts)


def block(
    config: Config,
    layer: Params,
    index: int,
    x: jax.Array,
    positions: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    """One layer."""
    query, key, dim = sizes(config)
    eps = config["rms_norm_eps"]

    def named(array: jax.Array, name: str) -> jax.Array:
        return checkpoint_name(array, f"block{index}.{name}")

    qkv = named(project(named(norm(x, layer["norm1"], eps), "normed"), layer["qkv"]), "qkv")
    heads = (*x.shape[:2], -1, dim)
    q, k, v = (part.reshape(heads) for part in jnp.split(qkv, (query, query + key), axis=-1))
    turned_by = angles(positions, dim, config["rope_theta"])
    q, k = named(rotate(q, turned_by), "q"), named(rotate(k, turned_by), "k")
    mixed = mix(q, k, v, mask(x.shape[1], segments)).reshape(*x.shape[:2], -1)
    x = named(add(x, named(project(named(mixed, "mixed"), layer["out"]), "attended")), "middle")
    normed = named(norm(x, layer["norm2"], eps), "normed2")
    gate_up = named(jnp.einsum("bth,hci->btci", normed, layer["gate_up"]), "gate_up")
    act = named(gated(gate_up[..., 0, :], gate_up[..., 1, :]), "act")
    return named(add(x, named(project(act, layer["down"]), "down")), "end")


def loss(
    config: Config,
    params: Params,
    ids: jax.Array,
    labels: jax.Array | None = None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Mean cross-entropy of the next token; all inputs are [B, T]."""
    x = checkpoint_name(embed(params["table"], ids), "embedded")
    positions = jnp.arange(ids.shape[1])[None] if positions is None else positions
    for index, layer in enumerate(params["layers"]):
        x = block(config, layer, index, x, positions, segments)
    x = checkpoint_name(norm(x, params["norm"], config["rms_norm_eps"]), "normed")
    logits = checkpoint_name(unembed(params, x), "logits").astype(jnp.float32)
    return cross_entropy(logits, ids if labels is None else labels)
