"""The decoder with a split residual stream against one device. Run by `test_tensor_parallel.py`."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from llama_jax import LlamaConfig, LlamaModel, quantize
from llama_jax.attention.zigzag import ZigZag
from llama_jax.models.tensor_parallel import find_ring, gather_matmul, matmul_scatter
from llama_jax.numerics.remat_policy import Kept
from llama_jax.sharding import parameter_shardings
from parity_tests.harness.compilation import FAST_FLAGS
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.reference.errors import relative_error
from train.hardware.collectives import collectives

# optimized for time to compile; the collectives are the same
use_host_devices(8, *FAST_FLAGS)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

LAYERS, HIDDEN = 2, 32


class Case(NamedTuple):
    """A configuration and a mesh; `bits` of its quantized weights."""

    mesh: dict[str, int]
    config: Mapping[str, Any] = MappingProxyType({})
    batch: int = 4
    length: int = 64
    remat: Any = "dots"
    zigzag: bool = False
    scan_unroll: int = 1
    bits: int | None = None


SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
THREE_AXES = {"fsdp": 2, "sequence": 2, "tensor": 2}
CASES = {
    "tensor4": Case({"tensor": 4}, {"attention_bias": True, "mlp_bias": True}, remat="none"),
    "tensor4-full": Case({"tensor": 4}, remat="full"),
    "zigzag": Case(THREE_AXES, {"num_key_value_heads": 2}, length=160, remat="full", zigzag=True),
    "length18": Case({"data": 2, "tensor": 4}, {"num_key_value_heads": 2}, length=18),
    "batch2": Case({"data": 2, "fsdp": 2, "tensor": 2}, batch=2, length=18),
}
SLOW_CASES = {
    "batch3": Case({"data": 2, "tensor": 4}, batch=3),
    "length1": Case({"data": 2, "tensor": 4}, length=1),
    "tensor8": Case({"tensor": 8}),
    "tensor3": Case({"tensor": 3}, SIX_HEADS | {"num_key_value_heads": 3}, length=24),
    "one-kv-head": Case({"tensor": 8}, {"num_key_value_heads": 1}),
    "six-heads": Case({"tensor": 4}, SIX_HEADS),
    "intermediate50": Case({"tensor": 4}, {"intermediate_size": 50}),
    "slices": Case({"tensor": 4}, {"num_key_value_heads": 2, "pretraining_tp": 2}, length=16),
    "dropout": Case(THREE_AXES, {"attention_dropout": 0.1}),
    "unrolled": Case({"tensor": 4}, scan_unroll=LAYERS),
    "kept": Case({"tensor": 4}, remat=Kept(saved=("key", "down"))),
    "offloaded": Case({"tensor": 4}, remat=Kept(("gate",), offloaded=("input", "output"))),
    "int8": Case({"fsdp": 2, "tensor": 4}, bits=8),
    "int4": Case({"fsdp": 2, "tensor": 4}, bits=4),
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
        first, second = gather_matmul(ring, float64, None, x, weights)
        return first, second, matmul_scatter(ring, float64, None, y, weights[0])

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


def decoder(case: Case) -> tuple[LlamaModel, Callable[..., Any]]:
    """A model, and `run(params, order)` for a loss and its gradients."""
    fields = {"vocab_size": 8, "hidden_size": HIDDEN, "intermediate_size": 48}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**fields | heads | dict(case.config), num_hidden_layers=LAYERS)
    model = LlamaModel(config, rngs=nnx.Rngs(0), dtype=jnp.float64)
    if case.bits:
        model = quantize(model, case.bits, group_size=8)
    graphdef = nnx.graphdef(model)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(case.batch, case.length, HIDDEN))
    segments = np.sort(rng.integers(0, 3, x.shape[:2]), axis=1).astype(np.int32)
    cotangent = np.linspace(-1, 2, x.size).reshape(x.shape)
    dropout_key = jax.random.key(0) if config.attention_dropout else None

    def loss(params: Any, x: Any, segments: Any, cotangent: Any, order: Any) -> Any:
        out = nnx.merge(graphdef, params)(
            inputs_embeds=x,
            segment_ids=segments,
            remat=case.remat,
            scan_unroll=case.scan_unroll,
            dropout_key=dropout_key,
            token_order=order,
        )
        return jnp.sum(jnp.sin(out.last_hidden_state) * cotangent)

    # quantized weights have no gradient
    gradient = jax.value_and_grad(loss, argnums=1 if case.bits else (0, 1))
    jitted = jax.jit(gradient, static_argnames="order")

    def run(params: Any, order: ZigZag | None) -> tuple[list[np.ndarray], str]:
        """The numbers, and the compiled program."""
        slots = np.arange(case.length) if order is None else order.slots(case.length)
        arrays = [jnp.asarray(array[:, slots]) for array in (x, segments, cotangent)]
        compiled = jitted.lower(params, *arrays, order=order).compile()
        value, gradients = compiled(params, *arrays)
        *of_params, of_x = map(np.asarray, jax.tree.leaves(gradients))
        return [np.asarray(value), *of_params, of_x[:, np.argsort(slots)]], compiled.as_text()

    return model, run


def largest_all_reduce(hlo: str) -> int:
    """Elements of the largest array that is all-reduced."""
    shapes = re.findall(r"= (.*) all-reduce(?:-start)?\(", hlo)
    arrays = [shape for line in shapes for shape in re.findall(r"\[([\d,]*)\]", line)]
    return max(int(np.prod([int(n) for n in shape.split(",") if n] or [1])) for shape in arrays)


def compare(name: str, case: Case) -> None:
    """Print the errors of the numbers over the mesh, and what the program there sends.

    activations: elements of [batch, length, hidden] on a device, were they not split over tensor.
    """
    model, run = decoder(case)
    params = nnx.to_pure_dict(nnx.state(model))
    want, _ = run(params, None)
    mesh = mesh_of(case.mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(model, mesh))
        order = ZigZag.of(case.length, case.mesh["sequence"]) if case.zigzag else None
        got, hlo = run(placed, order)
    token_shards = mesh.size // mesh.shape["tensor"]
    permutes = collectives(hlo).get("collective-permute")
    row = {
        "case": name,
        "errors": [relative_error(a, b) for a, b in zip(got, want, strict=True)],
        "permutes": permutes.count if permutes else 0,
        "largest_all_reduce": largest_all_reduce(hlo),
        "activations": case.batch * case.length * HIDDEN // token_shards,
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    if sys.argv[1:] == ["slow"]:
        for name, case in SLOW_CASES.items():
            compare(name, case)
        return
    for size in (3, 4):
        print(json.dumps({"case": f"ring{size}", "errors": ring_errors(size)}), flush=True)
    for name, case in CASES.items():
        compare(name, case)


if __name__ == "__main__":
    main()
