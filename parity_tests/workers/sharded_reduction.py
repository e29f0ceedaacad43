"""Gradients in bfloat16, summed over eight host devices. Run by `test_reduce_dtype.py`."""

import json
import sys
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoints import huggingface
from llama_jax.loss import shift_labels
from llama_jax.sharding import BATCH_AXES, SEQUENCE_AXIS, parameter_shardings
from parity_tests.harness.cases import BASE, Inputs, hf_model, inputs_of, weights_of
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.harness.programs import hf_numbers, oracle_numbers, our_model
from parity_tests.reference.errors import rms_error
from train.data.batch import Batch
from train.program.mesh import make_mesh
from train.program.step import batch_loss

# without this flag, XLA drops a rounding to bfloat16 that it does not need
use_host_devices(8, "--xla_allow_excess_precision=false")

CONFIG = BASE | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
INPUTS = Inputs(batch=8, length=32)
MESHES: dict[str, dict[str, int]] = {
    "fsdp8": {"fsdp": 8},
    "fsdp2-sequence2-tensor2": {"fsdp": 2, "sequence": 2, "tensor": 2},
}
SEEDS = 2


def gradient_of(params: Any, ids: Any, graphdef: Any, reduce_dtype: str | None) -> Any:
    batch = Batch(ids, shift_labels(ids), jnp.zeros_like(ids), jnp.arange(ids.shape[1])[None])

    def mean_loss(params: Any) -> Any:
        out = batch_loss(graphdef, params, batch, jnp.bfloat16, None, None, reduce_dtype)
        return out.loss / out.num_tokens.astype(jnp.float32)

    return jax.grad(mean_loss)(params)


def main() -> None:
    draws = []
    for seed in range(SEEDS):
        weights = {k: w.bfloat16().float() for k, w in weights_of(CONFIG, seed).items()}
        inputs = inputs_of(INPUTS, CONFIG, seed)
        inputs["labels"] = inputs["input_ids"]
        truth, hf = oracle_numbers(CONFIG, weights, inputs), hf_model(CONFIG, weights)
        for parameter in hf.parameters():
            parameter.data = parameter.data.bfloat16()
        ours = our_model(CONFIG, weights, jnp.bfloat16)
        ids = jnp.asarray(inputs["input_ids"], jnp.int32)
        draws.append((ours, ids, truth, hf_numbers(hf, inputs)))
    names = [name for name in draws[0][2] if name.startswith("grad ")]

    def error(gradients: list[dict[str, np.ndarray]], name: str) -> float:
        return rms_error([g[name] for g in gradients], [truth[name] for _, _, truth, _ in draws])

    theirs = {name: error([hf for *_, hf in draws], name) for name in names}
    run = jax.jit(gradient_of, static_argnums=(2, 3))
    for mesh_name in sys.argv[1:]:
        mesh = make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | MESHES[mesh_name])
        tokens_of = NamedSharding(mesh, P(BATCH_AXES, SEQUENCE_AXIS))
        ratios: dict[str, dict[str, float]] = defaultdict(dict)
        for dtype in (None, "bfloat16"):
            gradients = []
            for model, ids, _, _ in draws:
                graphdef, state = nnx.split(model)
                params = nnx.to_pure_dict(state)
                params = jax.device_put(params, parameter_shardings(model, mesh))
                with jax.set_mesh(mesh):
                    gradient = run(params, jax.device_put(ids, tokens_of), graphdef, dtype)
                tensors = huggingface.to_hf_tensors(nnx.merge(graphdef, gradient))
                gradients.append({f"grad {name}": np.asarray(array) for name, array in tensors})
            ratios[str(dtype)] = {name: error(gradients, name) / theirs[name] for name in names}
        print(json.dumps({"mesh": mesh_name, "ratios": ratios}), flush=True)


if __name__ == "__main__":
    main()
