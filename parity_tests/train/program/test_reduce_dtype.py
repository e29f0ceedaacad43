"""The sums of gradients over devices: their dtype, and what rounding costs."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.numerics.matmul import einsum
from llama_jax.presets import PRESETS
from parity_tests.harness.cases import BASE
from parity_tests.harness.child_process import output_lines
from parity_tests.reference.tolerances import ROUNDING_RATIO
from train.options import MeshOptions, ModelOptions, RunOptions
from train.program.build import run_program


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp8", "fsdp2-sequence2-tensor2"])
def test_parts_in_bfloat16_are_as_exact_as_hugging_face(mesh: str) -> None:
    """Rule P3 for every gradient; on a CPU the parts are rounded, but added up in float32."""
    (line,) = output_lines("workers.sharded_reduction", mesh)
    ratios: dict[str, dict[str, float]] = json.loads(line)["ratios"]
    for dtype, by_name in ratios.items():
        worst = max(by_name, key=by_name.__getitem__)
        print(f"{mesh}, sums in {dtype}: {worst} {by_name[worst]:.3f} x")
        assert by_name[worst] <= ROUNDING_RATIO
    default, rounded = ratios["None"], ratios["bfloat16"]
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        assert rounded[f"grad {name}"] > default[f"grad {name}"], "is not rounded"


@pytest.mark.parametrize("reduce_dtype", [None, "bfloat16"])
def test_a_weights_gradient_leaves_its_matmul_in_the_dtype(reduce_dtype: str | None) -> None:
    """XLA sums what the matmul of each device returns."""
    x, weight = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((6, 8), jnp.bfloat16)

    def energy(weight: Any) -> Any:
        return jnp.sum(einsum("ti,oi->to", x, weight, reduce_dtype=reduce_dtype))

    jaxpr = str(jax.make_jaxpr(jax.grad(energy))(weight))
    dtypes = re.findall(r":(\w+)\[[^\]]*\] = dot_general", jaxpr)
    forward, of_x, of_weight = dtypes
    assert (forward, of_x) == ("f32", "f32")
    assert of_weight == ("bf16" if reduce_dtype else "f32")


@pytest.mark.parametrize("items", [None, 6.0])
@pytest.mark.parametrize("reduce_dtype", [None, "bfloat16"])
def test_a_model_with_a_head_takes_the_dtype(reduce_dtype: str | None, items: float | None) -> None:
    """Of its layers' weights, of the head by its logits and, where rows are split, by its loss."""
    model = nnx.eval_shape(
        lambda: LlamaForCausalLM(LlamaConfig.from_dict(BASE), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    )
    graphdef, state = nnx.split(model)
    ids: Any = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def energy(state: Any, ids: Any) -> Any:
        out = nnx.merge(graphdef, state)(
            ids, labels=ids, num_items_in_batch=items, reduce_dtype=reduce_dtype
        )
        return out.loss + jnp.sum(out.logits.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("fsdp",), (AxisType.Auto,))):
        jaxpr = str(jax.make_jaxpr(jax.grad(energy))(state, ids))
    rounded = re.findall(r":bf16\[[^\]]*\] = dot_general", jaxpr)
    assert len(rounded) == (8 if reduce_dtype else 0)  # seven weights of the scanned layer
    # how the loss rounds on a CPU
    of_head = rf":f32\[{BASE['hidden_size']},{BASE['vocab_size']}\] = reduce_precision"
    assert len(re.findall(of_head, jaxpr)) == (1 if reduce_dtype else 0)


def test_the_sums_need_the_dtype_of_the_computation() -> None:
    options = RunOptions(
        model=ModelOptions(compute_dtype="float32", reduce_dtype="bfloat16"),
        mesh=MeshOptions(data=1),
    )
    with pytest.raises(ValueError, match="reduce-dtype: found bfloat16"):
        run_program(options, PRESETS["tiny-4m"])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs: pip install '.[plan]'"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sums_travel_in_the_dtype(dtype: str) -> None:
    (line,) = output_lines("workers.compiled_reduction", dtype)
    assert json.loads(line) == [{"float32": "f32", "bfloat16": "bf16"}[dtype]]
