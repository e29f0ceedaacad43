"""Gradients in bfloat16, summed over eight host devices. Run by `test_reduce_dtype.py`; prints JSON lines."""

import json
import os
import re
from collections import defaultdict

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llama_jax.checkpoints import huggingface
from llama_jax.loss import shift_labels
from llama_jax.sharding import BATCH_AXES, MESH_AXES, SEQUENCE_AXIS, parameter_shardings
from parity_tests.harness.cases import BASE, Inputs, hf_model, inputs_of, weights_of
from parity_tests.harness.programs import hf_numbers, oracle_numbers, our_model
from parity_tests.reference.errors import rms_error
from train.data.batch import Batch
from train.program.step import batch_loss

CONFIG = BASE | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
INPUTS = Inputs(batch=8, length=32)
MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "fsdp8": {"fsdp": 8},
    "data2-fsdp4": {"data": 2, "fsdp": 4},
    "fsdp2-sequence2-tensor2": {"fsdp": 2, "sequence": 2, "tensor": 2},
}
DTYPES = (None, "bfloat16")
SEEDS = 4


def mesh_of(sizes: dict[str, int]) -> Any:
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape), devices=devices)


def gradient_of(params: Any, ids: Any, graphdef: Any, reduce_dtype: str | None) -> Any:
    batch = Batch(ids, shift_labels(ids), jnp.zeros_like(ids), jnp.arange(ids.shape[1])[None])

    def mean_loss(params: Any) -> Any:
        out = batch_loss(graphdef, params, batch, jnp.bfloat16, None, None, reduce_dtype)
        return out.loss / out.num_tokens.astype(jnp.float32)

    return jax.grad(mean_loss)(params)


def by_name(gradient: Any, graphdef: Any) -> dict[str, np.ndarray]:
    model = nnx.merge(graphdef, jax.tree.map(np.asarray, gradient))
    return {f"grad {name}": np.asarray(a) for name, a in huggingface.to_hf_tensors(model)}


def reduced_dtypes(hlo: str) -> list[str]:
    """Dtypes of the matrices that a program adds up over devices."""
    sums = re.findall(r"= (.*) (?:all-reduce|reduce-scatter)(?:-start)?\(", hlo)
    return sorted({dtype for line in sums for dtype in re.findall(r"(\w+)\[\d+,[\d,]+\]", line)})


def main() -> None:
    draws = []
    for seed in range(SEEDS):
        weights = {k: w.bfloat16().float() for k, w in weights_of(CONFIG, seed).items()}
        inputs = inputs_of(INPUTS, CONFIG, seed)
        inputs["labels"] = inputs["input_ids"]
        hf = hf_model(CONFIG, weights)
        for parameter in hf.parameters():
            parameter.data = parameter.data.bfloat16()
        ours = our_model(CONFIG, weights, jnp.bfloat16)
        truth = oracle_numbers(CONFIG, weights, inputs)
        draws.append((ours, inputs["input_ids"], truth, hf_numbers(hf, inputs)))
    names = [name for name in draws[0][2] if name.startswith("grad ")]
    theirs = {
        name: rms_error([hf[name] for *_, hf in draws], [truth[name] for _, _, truth, _ in draws])
        for name in names
    }
    for mesh_name, sizes in MESHES.items():
        for dtype in DTYPES:
            mesh = mesh_of(sizes)
            run = jax.jit(gradient_of, static_argnums=(2, 3))
            gradients = defaultdict(list)
            with jax.set_mesh(mesh):
                for model, ids, _, _ in draws:
                    graphdef, state = nnx.split(model)
                    shardings = parameter_shardings(model, mesh)
                    params = jax.device_put(nnx.to_pure_dict(state), shardings)
                    tokens = jax.device_put(
                        jnp.asarray(ids, jnp.int32),
                        NamedSharding(mesh, PartitionSpec(BATCH_AXES, SEQUENCE_AXIS)),
                    )
                    for name, value in by_name(run(params, tokens, graphdef, dtype), graphdef).items():
                        gradients[name].append(value)
                lowered = run.lower(params, tokens, graphdef, dtype)
                text = lowered.compile().as_text()
            ratios = {
                name: rms_error(gradients[name], [truth[name] for _, _, truth, _ in draws])
                / theirs[name]
                for name in names
            }
            row = {"mesh": mesh_name, "dtype": dtype, "ratios": ratios, "reduced": reduced_dtypes(text)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
