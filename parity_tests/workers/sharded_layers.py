"""The decoder with a split residual stream against one device. Run by `test_tensor_parallel.py`."""

import json
import os
import re

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from llama_jax import LlamaConfig, LlamaModel
from llama_jax.models.tensor_parallel import find_ring, gather_matmul, matmul_scatter
from llama_jax.sharding import parameter_shardings
from parity_tests.reference.errors import relative_error
from train.hardware.collectives import collectives

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

LAYERS, BATCH, HIDDEN = 2, 4, 32
# axes of the mesh, kv heads, length, remat, other options of the config
CASES: dict[str, tuple[dict[str, int], int, int, str, dict[str, Any]]] = {
    "tensor4": ({"tensor": 4}, 4, 64, "none", {"attention_bias": True, "mlp_bias": True}),
    "tensor4-full": ({"tensor": 4}, 4, 64, "full", {}),
    "fsdp2-sequence2-tensor2": ({"fsdp": 2, "sequence": 2, "tensor": 2}, 2, 160, "full", {}),
    "data2-tensor4-length18": ({"data": 2, "tensor": 4}, 2, 18, "dots", {}),
    "tensor4-kv2-slices": ({"tensor": 4}, 2, 16, "dots", {"pretraining_tp": 2}),
}


def mesh_of(sizes: dict[str, int]) -> Any:
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)


def ring_errors(size: int) -> list[float]:
    """Results and gradients of both matmuls on a ring of `size`, against plain einsums."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(2, 2 * size, 3 * size))) for _ in range(2))
    weights = tuple(jnp.asarray(rng.normal(size=(n * size, 3 * size))) for n in (3, 5))

    def on_ring(x: Any, y: Any, weights: Any) -> Any:
        ring = find_ring(*x.shape, *map(len, weights))
        assert ring is not None
        float64 = jnp.dtype(jnp.float64)
        first, second = gather_matmul(ring, float64, x, weights)
        return first, second, matmul_scatter(ring, float64, y, weights[0])

    def plain(x: Any, y: Any, weights: Any) -> Any:
        operands = ((x, weights[0]), (x, weights[1]), (y, weights[0]))
        return tuple(jnp.einsum("bsi,oi->bso", *pair) for pair in operands)

    def with_gradients(function: Callable[..., Any]) -> list[np.ndarray]:
        outs, transpose = jax.vjp(jax.jit(function), x, y, weights)
        return list(map(np.asarray, jax.tree.leaves((outs, transpose(outs)))))

    want = with_gradients(plain)
    with jax.set_mesh(mesh_of({"tensor": size})):
        got = with_gradients(on_ring)
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


def decoder(
    kv_heads: int, length: int, options: dict[str, Any], dtype: Any
) -> tuple[LlamaModel, Callable[..., Any], Any]:
    """A model, `run(params, x, remat)` for the loss and its gradients, and its arguments."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        **options,
    )
    model = LlamaModel(config, rngs=nnx.Rngs(0), dtype=jnp.float64)
    graphdef, state = nnx.split(model)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.to_pure_dict(state))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, length, HIDDEN)), dtype)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (BATCH, length)), axis=1), jnp.int32)

    def loss(params: Any, x: Any, remat: Any) -> Any:
        merged = nnx.merge(graphdef, params)
        out = merged(inputs_embeds=x, segment_ids=segments, remat=remat).last_hidden_state
        weights = jnp.linspace(-1, 2, out.size).reshape(out.shape)
        return jnp.sum(jnp.sin(out.astype(weights.dtype)) * weights)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    return model, run, (params, x)


def on_mesh(model: LlamaModel, run: Any, arguments: Any, sizes: dict[str, int], remat: str) -> Any:
    """The result over the mesh, and the compiled program."""
    mesh = mesh_of(sizes)
    params = jax.device_put(arguments[0], parameter_shardings(model, mesh))
    with jax.set_mesh(mesh):
        compiled = run.lower(params, arguments[1], remat).compile()
        return jax.tree.leaves(compiled(params, arguments[1])), compiled.as_text()


def largest_all_reduce(hlo: str) -> int:
    """Elements of the largest array that is all-reduced."""
    shapes = re.findall(r"= (.*) all-reduce(?:-start)?\(", hlo)
    arrays = [shape for line in shapes for shape in re.findall(r"\[([\d,]*)\]", line)]
    return max(int(np.prod([int(n) for n in shape.split(",") if n] or [1])) for shape in arrays)


def main() -> None:
    for size in (2, 3, 4):
        print(json.dumps({"case": f"ring{size}", "errors": ring_errors(size)}), flush=True)
    for name, (sizes, kv_heads, length, remat, options) in CASES.items():
        model, run, arguments = decoder(kv_heads, length, options, jnp.float64)
        want = jax.tree.leaves(run(*arguments, remat))
        got, hlo = on_mesh(model, run, arguments, sizes, remat)
        pairs = zip(got, want, strict=True)
        permutes = collectives(hlo).get("collective-permute")
        row = {
            "case": name,
            "errors": [relative_error(np.asarray(a), np.asarray(b)) for a, b in pairs],
            "permutes": permutes.count if permutes else 0,
            "largest_all_reduce": largest_all_reduce(hlo),
            "residual": BATCH * length * HIDDEN,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
