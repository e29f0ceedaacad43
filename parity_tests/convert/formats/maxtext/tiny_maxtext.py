"""Trees of MaxText's Llama, as MaxText 0.2.5 saves them, made from a Hugging Face model with numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from llama_jax.checkpoints.orbax import quiet_orbax

Tensors = dict[str, np.ndarray]

HALVES = "model_name: default\nrope_type: default\n"
PAIRS = "model_name: llama3.1-8b\nrope_type: default\nrope_use_scale: false\n"


def heads_of(rows: np.ndarray, heads: int, pairs: bool) -> np.ndarray:
    """Rows of a projection [heads * D, E] as MaxText's kernel [E, heads, D]."""
    kernel = rows.reshape(heads, -1, rows.shape[1]).transpose(2, 0, 1)
    if pairs:
        first, second = np.split(kernel, 2, axis=-1)
        kernel = np.stack([first, second], axis=-1).reshape(kernel.shape)
    return kernel


def layer_leaves(tensors: Tensors, layer: int, config: Any, pairs: bool) -> Tensors:
    """The arrays of one layer, by their paths within it."""

    def tensor(name: str) -> np.ndarray:
        return tensors[f"model.layers.{layer}.{name}.weight"]

    queries, keys = config.num_attention_heads, config.num_key_value_heads
    query = heads_of(tensor("self_attn.q_proj"), queries, pairs)
    root = np.float64(config.head_dim) ** 0.5
    return {
        "pre_self_attention_layer_norm/scale": tensor("input_layernorm"),
        "self_attention/query/kernel": (query / root).astype(query.dtype),
        "self_attention/key/kernel": heads_of(tensor("self_attn.k_proj"), keys, pairs),
        "self_attention/value/kernel": heads_of(tensor("self_attn.v_proj"), keys, False),
        "self_attention/out/kernel": tensor("self_attn.o_proj").T.reshape(
            queries, config.head_dim, -1
        ),
        "post_self_attention_layer_norm/scale": tensor("post_attention_layernorm"),
        "mlp/wi_0/kernel": tensor("mlp.gate_proj").T,
        "mlp/wi_1/kernel": tensor("mlp.up_proj").T,
        "mlp/wo/kernel": tensor("mlp.down_proj").T,
    }


def maxtext_leaves(
    tensors: Tensors, config: Any, *, scanned: bool = True, pairs: bool = False
) -> Tensors:
    """All arrays, by their paths below `params/params`."""
    leaves = {
        "token_embedder/embedding": tensors["model.embed_tokens.weight"],
        "decoder/decoder_norm/scale": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        leaves["decoder/logits_dense/kernel"] = tensors["lm_head.weight"].T
    layers = [
        layer_leaves(tensors, layer, config, pairs) for layer in range(config.num_hidden_layers)
    ]
    if scanned:
        leaves |= {
            f"decoder/layers/{path}": np.stack([layer[path] for layer in layers], axis=1)
            for path in layers[0]
        }
    else:
        leaves |= {
            f"decoder/layers_{number}/{path}": values
            for number, layer in enumerate(layers)
            for path, values in layer.items()
        }
    return {path: np.ascontiguousarray(values) for path, values in leaves.items()}


def save(leaves: dict[str, Any], directory: Path, **options: Any) -> Path:
    """Save arrays by their paths, as Orbax does.

    Args:
        options: of PyTreeCheckpointHandler, and `chunk_byte_size` of the arrays.
    """
    chunk_bytes = options.pop("chunk_byte_size", None)
    tree = traverse_util.unflatten_dict(leaves, sep="/")
    arguments = traverse_util.unflatten_dict(
        {path: ocp.SaveArgs(chunk_byte_size=chunk_bytes) for path in leaves}, sep="/"
    )
    handler = ocp.PyTreeCheckpointHandler(**options)
    with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree, arguments))
    return directory


def full_state(leaves: Tensors) -> dict[str, Any]:
    """The whole state of a training run."""
    params = {f"params/params/{path}": values for path, values in leaves.items()}
    moments = {
        f"opt_state/0/{kind}/params/{path}": np.zeros_like(values)
        for kind in ("mu", "nu")
        for path, values in leaves.items()
    }
    counts = {f"opt_state/{number}/count": np.int32(7) for number in (0, 2)}
    rng = {"nnx_aux/model/decoder/rngs/params/count": np.uint32(3)}
    return params | moments | counts | rng | {"step": np.int32(7)}
