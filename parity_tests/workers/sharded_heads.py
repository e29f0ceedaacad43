"""Losses of the task models on four host devices against one. Run by `test_task_weights.py`."""

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
from llama_jax.sharding import MESH_AXES, parameter_shardings
from parity_tests.harness.host_devices import use_host_devices

use_host_devices(4)

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
    mesh = jax.make_mesh((1, 1, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    for model_class, labels in targets.items():
        model = model_class(CONFIG, rngs=nnx.Rngs(0))
        arrays = {name: jnp.asarray(value, jnp.int32) for name, value in labels.items()}
        loss_of = jax.jit(lambda model, ids, arrays: model(ids, **arrays).loss)
        tokens = jnp.asarray(ids, jnp.int32)
        want = loss_of(model, tokens, arrays)
        graphdef, params = nnx.split(model)
        shardings = parameter_shardings(model, mesh)
        placed = jax.device_put(nnx.to_pure_dict(params), shardings)
        split = [x.addressable_shards[0].data.size < x.size for x in jax.tree.leaves(placed)]
        assert sum(split) >= len(split) - 1, "only the bias of a head is replicated"
        nnx.replace_by_pure_dict(params, placed)
        with jax.set_mesh(mesh):
            got = loss_of(nnx.merge(graphdef, params), tokens, arrays)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        print(model_class.__name__)


if __name__ == "__main__":
    main()
