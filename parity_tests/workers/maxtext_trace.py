"""Record MaxText's forward pass. Run by `test_maxtext_trace.py` with MaxText's own interpreter.

python -m parity_tests.workers.maxtext_trace TOKENS.npy TRACE CONFIG.yml NAME=VALUE...
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity_tests.traces.record_jax import record_jax

_LAYER = "model.layers.{layer}"
_NAMES = {  # of its own remat policies; queries and keys are rotated where they get theirs
    "key_proj": f"{_LAYER}.self_attn.rotate.k.output",
    "value_proj": f"{_LAYER}.self_attn.v_proj.output",
    "attention_out": f"{_LAYER}.self_attn.o_proj.input",
    "out_proj": f"{_LAYER}.self_attn.o_proj.output",
    "mlpwi_0": f"{_LAYER}.mlp.gate_proj.output",
    "mlpwi_1": f"{_LAYER}.mlp.up_proj.output",
    "mlpwo": f"{_LAYER}.mlp.down_proj.output",
    "logits": "lm_head.output",
}


def _query(array: jax.Array) -> dict[str, jax.Array]:
    """MaxText has the scale of the scores in the queries' weights."""
    return {f"{_LAYER}.self_attn.rotate.q.output": array * array.shape[-1] ** 0.5}


def weights(params: Any) -> dict[str, jax.Array]:
    """Those whose values are Hugging Face's, with all layers on the second axis."""
    decoder = params["decoder"]
    layers = decoder["layers"]
    tensors = {
        "model.embed_tokens.weight": params["token_embedder"]["embedding"],
        "model.norm.weight": decoder["decoder_norm"]["scale"],
        "lm_head.weight": decoder["logits_dense"]["kernel"].T,
    }
    mlp = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}
    for layer in range(layers["mlp"]["wo"]["kernel"].shape[1]):
        for name, theirs in mlp.items():
            kernel = layers["mlp"][theirs]["kernel"][:, layer]
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = kernel.T
    return tensors


def main(tokens_file: str, out: str, *settings: str) -> None:
    from flax import nnx
    from jax.sharding import Mesh
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, model_creation_utils

    config = pyconfig.initialize(["program", *settings])
    mesh = Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = model_creation_utils.from_pretrained(config, mesh)
    model = model[0] if isinstance(model, tuple) else model
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.asarray(np.load(tokens_file))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = nnx.merge(graph, params, rest)(
            tokens,
            positions,
            decoder_segment_ids=jnp.ones_like(tokens),
            enable_dropout=False,
            model_mode="train",
        )
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)[:, :-1])
        chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)
        return -jnp.mean(chosen), {"logits": logits}

    with mesh:
        record_jax(
            loss,
            params,
            out,
            inputs={"input_ids": tokens},
            names=_NAMES | {"query_proj": _query},
            weights=lambda params: weights(nnx.to_pure_dict(params)),
            backward=False,
            program="MaxText",
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
