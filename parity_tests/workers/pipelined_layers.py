"""The decoder over the stages of a pipeline against one device. Run by `test_pipeline.py`."""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from llama_jax import LlamaConfig, LlamaModel
from llama_jax.models.pipeline import Pipeline
from llama_jax.sharding import STAGE_AXIS, parameter_shardings
from parity_tests.harness.compilation import FAST_FLAGS
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.reference.errors import relative_error, rms_error
from train.hardware.links import traffic
from train.hardware.transfers import transfers

# programs for several devices compile twice as fast with these
use_host_devices(8, *FAST_FLAGS)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

LAYERS, LENGTH, HIDDEN = 8, 16, 32


class Case(NamedTuple):
    """A mesh, a pipeline over it, and how the layers run."""

    mesh: dict[str, int]
    pipeline: Pipeline | None
    remat: str = "full"
    scan_unroll: int = 1
    attention: str | None = None
    dropout: bool = False
    dtype: str = "float64"
    rows: int = 8


NUMBERS = 8 * LENGTH * 8  # bytes, of a number for each token
EIGHT = {"stage": 2, "fsdp": 2, "tensor": 2}
CASES = {
    "stage2-fsdp2-tensor2": Case(EIGHT, Pipeline(4)),
    "stage4-repeats2-dropout": Case({"stage": 4}, Pipeline(4, 2), "none", dropout=True),
    "bfloat16": Case({"stage": 2}, Pipeline(64), dtype="bfloat16", rows=64),
}
SLOW_CASES = {
    "stage4": Case({"stage": 4}, Pipeline(8), "dots"),
    "stage4-repeats2": Case({"stage": 4, "data": 2}, Pipeline(4, 2), "none"),
    "stage2-repeats4": Case({"stage": 2, "sequence": 2}, Pipeline(8, 4), scan_unroll=2),
    "blocked-attention": Case(EIGHT, Pipeline(4, 2), scan_unroll=2, attention="blocked"),
    "without-a-pipeline": Case(EIGHT, None),
    "float32": Case(EIGHT, Pipeline(4, 2), dtype="float32"),
}


def mesh_of(sizes: dict[str, int]) -> Any:
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)


def decoder(case: Case, dtype: Any) -> tuple[LlamaModel, Callable[..., Any], Any]:
    """A model, `run(params, x, pipeline)` for the loss and its gradients, and its arguments."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        attention_dropout=0.3 if case.dropout else 0.0,
    )
    model = LlamaModel(config, rngs=nnx.Rngs(0), dtype=jnp.float64)
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)
    # biases and norms are all alike at first, and the layers' weights nearly so
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.1 * rng.normal(size=leaf.shape)).astype(dtype),
        nnx.to_pure_dict(state),
    )
    x = jnp.asarray(rng.normal(size=(case.rows, LENGTH, HIDDEN)), dtype)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (case.rows, LENGTH)), axis=1), jnp.int32)
    positions = jnp.asarray(rng.integers(0, 40, (case.rows, LENGTH)), jnp.int32)
    key = jax.random.key(7) if case.dropout else None

    def loss(params: Any, x: Any, pipeline: Pipeline | None) -> Any:
        out = nnx.merge(graphdef, params)(
            inputs_embeds=x,
            segment_ids=segments,
            position_ids=positions,
            dropout_key=key,
            remat=case.remat,
            scan_unroll=case.scan_unroll,
            attention_implementation=case.attention,
            pipeline=pipeline,
        ).last_hidden_state
        weights = jnp.asarray(np.linspace(-1, 2, out.size).reshape(out.shape))
        return jnp.sum(jnp.sin(out.astype(weights.dtype)) * weights)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    return model, run, (params, x)


def on_mesh(case: Case, model: LlamaModel, run: Any, arguments: Any) -> Any:
    """The result of the pipeline, and the compiled program."""
    mesh = mesh_of(case.mesh)
    params = jax.device_put(arguments[0], parameter_shardings(model, mesh))
    with jax.set_mesh(mesh):
        compiled = run.lower(params, arguments[1], case.pipeline).compile()
        return jax.tree.leaves(compiled(params, arguments[1])), compiled.as_text()


def over_stages(hlo: str, mesh: Any) -> list[tuple[str, int, int]]:
    """Kind, count and bytes of each collective between stages, of those that send more than numbers."""
    found = [
        (transfer.kind, transfer.times, transfer.bytes // transfer.times)
        for transfer in transfers(hlo)
        if any(STAGE_AXIS in row.axes for row in traffic([transfer], mesh))
    ]
    return sorted(row for row in found if row[2] > NUMBERS)


def result(case: Case) -> dict[str, Any]:
    """Relative errors of a float64 pipeline; of others the rms error, with and without the pipeline."""
    model, run, exact_arguments = decoder(case, jnp.float64)
    exact = jax.tree.leaves(run(*exact_arguments, None))
    if case.dtype == "float64":
        got, hlo = on_mesh(case, model, run, exact_arguments)
        errors = list(map(relative_error, got, exact))
        return {"errors": errors, "over_stages": over_stages(hlo, mesh_of(case.mesh))}
    model, run, arguments = decoder(case, case.dtype)
    plain = jax.tree.leaves(run(*arguments, None))
    return {
        "rms": rms_error(on_mesh(case, model, run, arguments)[0], exact),
        "rms_of_one_device": rms_error(plain, exact),
    }


def main() -> None:
    cases = SLOW_CASES if sys.argv[1:] == ["slow"] else CASES
    for name, case in cases.items():
        print(json.dumps({"case": name, **result(case)}), flush=True)


if __name__ == "__main__":
    main()
