"""What each `jax_default_matmul_precision` costs a float32 model: the real checkpoint against the oracle.

What a setting means depends on the platform (`jax.lax.Precision`). On TPU, default, high and highest are
one, three and six bfloat16 passes; on NVIDIA, default and high are TF32 and highest is float32; a CPU has
only float32. On a TPU or GPU its own settings are measured. On a CPU those of the others are emulated:
operands of every matmul are rounded to nearest, and sums are float32.
"""

import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.table import Table

from benchmarks.real_checkpoint import real_checkpoint
from llama_jax import LlamaForCausalLM, formatting
from llama_jax.numerics import matmul
from parity_tests.report.measure.errors import errors
from parity_tests.report.programs.checkpoint import Checkpoint, open_checkpoint
from parity_tests.report.programs.oracle_layers import OracleProgram
from parity_tests.report.programs.steps import OUTPUT
from parity_tests.report.tokens import bundled_tokens

_ROWS = 64  # positions whose float64 logits are compared at once

BFLOAT16, TF32 = 7, 10  # mantissa bits

# platform, settings, description, mantissa bits, parts of an operand
EMULATED = (
    ("TPU", "highest", "six bfloat16 passes", BFLOAT16, 3),
    ("TPU", "high", "three bfloat16 passes", BFLOAT16, 2),
    ("TPU", "default", "one bfloat16 pass", BFLOAT16, 1),
    ("NVIDIA", "high, default", "TF32", TF32, 1),
)


class Drift(NamedTuple):
    """rms: error of the logits, relative to the rms of their row. kl: mean divergence from the oracle, in
    nats. top1: share of positions with the oracle's top-1 token. loss: mean loss minus the oracle's."""

    rms: float
    kl: float
    top1: float
    loss: float


def main() -> None:
    """Print the table."""
    with real_checkpoint() as directory:
        checkpoint = open_checkpoint(directory)
        ids = bundled_tokens(checkpoint)
        exact = oracle_logits(checkpoint, ids)
        load = partial(LlamaForCausalLM.from_pretrained, directory)
        device, rows = jax.devices()[0].device_kind, []

        def add(names: tuple[str, str, str], model: LlamaForCausalLM, context: Any) -> None:
            with context:
                logits = model(jnp.asarray(ids, jnp.int32)).logits[0]
                row = drift(np.array(logits, np.float32), exact, ids)
            rows.append((names, row))

        model = load(dtype=jnp.float32)
        if jax.default_backend() == "cpu":
            add((device, "any", "float32"), model, nullcontext())
            for platform, settings, passes, bits, parts in EMULATED:
                names = (platform, settings, f"{passes}, emulated")
                add(names, model, emulated(bits, parts))
        else:
            for setting in ("highest", "high", "default"):
                add((device, setting, "measured"), model, jax.default_matmul_precision(setting))
        add(
            (device, "any", "all in bfloat16, weights too"), load(dtype=jnp.bfloat16), nullcontext()
        )
    table = Table(
        title=f"SmolLM2-135M-Instruct, {ids.shape[1]} tokens, against the float64 oracle",
        title_justify="left",
    )
    for column in ("platform", "precision", "matmuls"):
        table.add_column(column)
    for column in ("rms logit error", "mean KL", "top-1", "loss"):
        table.add_column(column, justify="right")
    for names, row in rows:
        numbers = f"{row.rms:.1e}", f"{row.kl:.1e}", f"{row.top1:.2%}", f"{row.loss:+.1e}"
        table.add_row(*names, *numbers)
    formatting.console(width=110).print(table)


def oracle_logits(checkpoint: Checkpoint, ids: np.ndarray) -> torch.Tensor:
    """Logits [T, V] in float64, from the checkpoint's weights in float32."""
    program = OracleProgram(checkpoint, np.dtype(np.float32))
    hidden = program.embed(ids)
    for layer in range(checkpoint.config.num_hidden_layers):
        hidden = program.layer(layer, hidden)[OUTPUT]
    return next(program.logits(program.norm(hidden), ids.shape[1]))


def drift(logits: np.ndarray, exact: torch.Tensor, ids: np.ndarray) -> Drift:
    """Of float32 logits [T, V] from the oracle's `exact`, on `ids` [1, T]."""
    blocks = []
    tokens = torch.from_numpy(ids)[0]
    for first in range(0, len(logits), _ROWS):
        rows = slice(first, first + _ROWS)
        reference, ours = exact[rows], torch.from_numpy(logits[rows]).double()
        log_reference, log_probs = reference.log_softmax(-1), ours.log_softmax(-1)
        next_tokens = tokens[first + 1 : first + 1 + len(reference), None]
        rms = errors(ours, reference, 1.0, len(reference)).by_position
        kl = (log_reference.exp() * (log_reference - log_probs)).sum(1)
        same = ours.argmax(1) == reference.argmax(1)
        loss = (log_reference - log_probs)[: len(next_tokens)].gather(1, next_tokens)[:, 0]
        blocks.append((np.square(rms), kl.numpy(), same.numpy(), loss.numpy()))
    square, *means = (float(np.mean(np.concatenate(part))) for part in zip(*blocks, strict=True))
    return Drift(square**0.5, *means)


@contextmanager
def emulated(bits: int, parts: int) -> Iterator[None]:
    """Every float32 matmul of llama_jax's forward pass is done by `emulated_einsum`."""
    einsum = partial(emulated_einsum, bits=bits, parts=parts)
    jax.clear_caches()  # JAX does not see that the function has changed
    with mock.patch.object(matmul, "_plain_einsum", einsum):
        yield
    jax.clear_caches()


def emulated_einsum(spec: str, a: jax.Array, b: jax.Array, *, bits: int, parts: int) -> jax.Array:
    """`jnp.einsum` of float32 arrays by matmuls of numbers with few mantissa bits, as hardware does it.

    Each operand is split into a sum of `parts`, every part the rounded remainder of those before it.
    Matmuls of two small parts are left out, which leaves `parts * (parts + 1) / 2` of them.
    """
    a_parts, b_parts = (_split(x, bits, parts) for x in (a, b))
    pairs = [(i, j) for i in range(parts) for j in range(parts - i)]
    smallest_first = sorted(pairs, key=sum, reverse=True)
    einsum = partial(jnp.einsum, spec, preferred_element_type=a.dtype)
    return functools.reduce(
        operator.add, (einsum(a_parts[i], b_parts[j]) for i, j in smallest_first)
    )


def _split(x: jax.Array, bits: int, parts: int) -> list[jax.Array]:
    rounded = []
    for _ in range(parts):
        rounded.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits))
        x = x - rounded[-1]
    return rounded
