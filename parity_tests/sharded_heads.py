"""Run by `test_task_weights.py` in a process of four host devices: losses and gradients of the task
models are those of one device."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from llama_jax import (
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from llama_jax.hf import to_hf_tensors
from llama_jax.sharding import MESH_AXES, parameter_shardings

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=16,
    pad_token_id=0,
    num_labels=3,
)


def main() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (4, 8))
    targets: dict[Any, dict[str, np.ndarray]] = {
        LlamaForSequenceClassification: {"labels": rng.integers(0, 3, 4)},
        LlamaForTokenClassification: {"labels": rng.integers(0, 3, (4, 8))},
        LlamaForQuestionAnswering: {
            "start_positions": rng.integers(0, 8, 4),
            "end_positions": rng.integers(0, 8, 4),
        },
    }
    mesh = jax.make_mesh((1, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    for model_class, given in targets.items():
        model = model_class(CONFIG, rngs=nnx.Rngs(0))
        arrays = {name: jnp.asarray(value, jnp.int32) for name, value in given.items()}
        step = jax.jit(
            jax.value_and_grad(lambda model, ids, arrays: model(ids, **arrays).loss),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        tokens = jnp.asarray(ids, jnp.int32)
        want_loss, want = step(model, tokens, arrays)
        graphdef, params = nnx.split(model)
        shardings = parameter_shardings(model, mesh)
        placed = jax.device_put(nnx.to_pure_dict(params), shardings)
        split = [x.addressable_shards[0].data.size < x.size for x in jax.tree.leaves(placed)]
        assert sum(split) >= len(split) - 1, "only a head's bias is whole on every device"
        nnx.replace_by_pure_dict(params, placed)
        with jax.set_mesh(mesh):
            loss, got = step(nnx.merge(graphdef, params), tokens, arrays)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
        for (name, a), (_, b) in zip(to_hf_tensors(got), to_hf_tensors(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)
        print(model_class.__name__)


if __name__ == "__main__":
    main()
