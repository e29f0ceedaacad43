"""Compile time of 32 layers against 4. The layers are one scan: it must not grow with depth."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table

from llama_jax import LlamaConfig, LlamaForCausalLM, formatting

WIDTHS = LlamaConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1376,
    num_attention_heads=8,
    num_key_value_heads=4,
    rms_norm_eps=1e-5,
)
DEPTHS = (4, 32)
ROUNDS = 5


def main() -> None:
    """Print the median seconds of tracing, lowering and compiling, and the ratio of the depths."""
    table = Table(title=f"compile time, median of {ROUNDS}, on {jax.devices()[0].device_kind}")
    for column in ("", *(f"{depth} layers" for depth in DEPTHS), "ratio"):
        table.add_column(column, justify="right")
    for name, function in (("forward", _forward), ("gradient", jax.grad(_loss))):
        # alternating, so that a machine that slows down slows both
        rounds = [[_compile_seconds(function, depth) for depth in DEPTHS] for _ in range(ROUNDS)]
        shallow, deep = (statistics.median(column) for column in zip(*rounds, strict=True))
        table.add_row(name, f"{shallow:.2f} s", f"{deep:.2f} s", f"{deep / shallow:.2f}")
    formatting.console().print(table)


def _forward(model: LlamaForCausalLM, ids: jax.Array) -> jax.Array:
    return model(ids).logits


def _loss(model: LlamaForCausalLM, ids: jax.Array) -> jax.Array | None:
    return model(ids, labels=ids).loss


def _compile_seconds(function: Callable[..., Any], depth: int) -> float:
    config = replace(WIDTHS, num_hidden_layers=depth)
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    jax.clear_caches()
    begin = time.perf_counter()
    jax.jit(function).lower(model, ids).compile()
    return time.perf_counter() - begin
