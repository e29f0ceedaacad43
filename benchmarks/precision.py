"""How far `jax_default_matmul_precision` moves a float32 model: the real checkpoint against the oracle.

What a setting means depends on the platform (`jax.lax.Precision`): on TPU, default, high and highest are
one, three and six bfloat16 passes; on NVIDIA, default and high are TF32, highest float32; a CPU has float32
alone. On a TPU or GPU its own settings are measured. On a CPU theirs are emulated: the operands of every
product are rounded, to nearest, and sums are float32.
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
from parity_tests.report.measure.metrics import errors
from parity_tests.report.programs.checkpoint import Checkpoint, open_checkpoint
from parity_tests.report.programs.oracle_layers import OracleProgram
from parity_tests.report.programs.program import OUTPUT
from parity_tests.report.tokens import bundled_tokens

_ROWS = 64  # positions whose float64 logits are compared at once

BFLOAT16, TF32 = 7, 10  # bits of their mantissas

# platform, settings, what they are, mantissa bits, parts of an operand
EMULATED = (
    ("TPU", "highest", "six bfloat16 passes", BFLOAT16, 3),
    ("TPU", "high", "three bfloat16 passes", BFLOAT16, 2),
    ("TPU", "default", "one bfloat16 pass", BFLOAT16, 1),
    ("NVIDIA", "high, default", "TF32", TF32, 1),
)


class Drift(NamedTuple):
    """rms: of the logits, relative to their row's. kl: mean, from the oracle, nats. top1: share of
    positions that prefer the oracle's token. loss: the mean's difference from the oracle's."""

    rms: float
    kl: float
    top1: float
    loss: float


def main() -> None:
    """Print the table."""
    with real_checkpoint() as directory:
        checkpoint = open_checkpoint(directory)
        ids = bundled_tokens(checkpoint)
        truth = oracle_logits(checkpoint, ids)
        load = partial(LlamaForCausalLM.from_pretrained, directory)
        device, rows = jax.devices()[0].device_kind, []

        def add(names: tuple[str, str, str], model: LlamaForCausalLM, context: Any) -> None:
            with context:
                logits = model(jnp.asarray(ids, jnp.int32)).logits[0]
                found = drift(np.array(logits, np.float32), truth, ids)
            rows.append((names, found))

        model = load(dtype=jnp.float32)
        if jax.default_backend() == "cpu":
            add((device, "any", "float32"), model, nullcontext())
            for platform, settings, what, bits, parts in EMULATED:
                names = (platform, settings, f"{what}, emulated")
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
    for column in ("on", "precision", "products"):
        table.add_column(column)
    for column in ("rms logit error", "mean KL", "top-1", "loss"):
        table.add_column(column, justify="right")
    for names, found in rows:
        numbers = f"{found.rms:.1e}", f"{found.kl:.1e}", f"{found.top1:.2%}", f"{found.loss:+.1e}"
        table.add_row(*names, *numbers)
    formatting.console(width=110).print(table)


def oracle_logits(checkpoint: Checkpoint, ids: np.ndarray) -> torch.Tensor:
    """float64 [T, V], of the checkpoint's weights as float32."""
    program = OracleProgram(checkpoint, np.dtype(np.float32))
    hidden = program.embed(ids)
    for layer in range(checkpoint.config.num_hidden_layers):
        hidden = program.layer(layer, hidden)[OUTPUT]
    return next(program.logits(program.norm(hidden), ids.shape[1]))


def drift(got: np.ndarray, truth: torch.Tensor, ids: np.ndarray) -> Drift:
    """Of logits float32 [T, V] from the oracle's; ids [1, T]."""
    blocks = []
    targets = torch.from_numpy(ids)[0]
    for first in range(0, len(got), _ROWS):
        rows = slice(first, first + _ROWS)
        want, have = truth[rows], torch.from_numpy(got[rows]).double()
        logs, ours = torch.log_softmax(want, dim=-1), torch.log_softmax(have, dim=-1)
        after = targets[first + 1 : first + 1 + len(want), None]
        rms = errors(have, want, 1.0, len(want)).by_position
        kl = (logs.exp() * (logs - ours)).sum(1)
        same = have.argmax(1) == want.argmax(1)
        loss = (logs - ours)[: len(after)].gather(1, after)[:, 0]
        blocks.append((np.square(rms), kl.numpy(), same.numpy(), loss.numpy()))
    square, *means = (float(np.mean(np.concatenate(each))) for each in zip(*blocks, strict=True))
    return Drift(square**0.5, *means)


@contextmanager
def emulated(bits: int, parts: int) -> Iterator[None]:
    """Every float32 product of llama_jax's forward pass by `product`; traced anew, for JAX cannot know."""
    multiply = partial(product, bits=bits, parts=parts)
    jax.clear_caches()
    with mock.patch.object(matmul, "_plain_einsum", multiply):
        yield
    jax.clear_caches()


def product(spec: str, a: jax.Array, b: jax.Array, *, bits: int, parts: int) -> jax.Array:
    """`jnp.einsum` of float32 by `parts * (parts + 1) / 2` products of numbers with so many mantissa bits.

    Each operand is a sum of parts, every one what rounding the sum before it has left; products of two
    small parts are left out, as on the hardware.
    """
    of_a, of_b = (_split(x, bits, parts) for x in (a, b))
    pairs = [(i, j) for i in range(parts) for j in range(parts - i)]
    smallest_first = sorted(pairs, key=sum, reverse=True)
    multiply = partial(jnp.einsum, spec, preferred_element_type=a.dtype)
    return functools.reduce(operator.add, (multiply(of_a[i], of_b[j]) for i, j in smallest_first))


def _split(x: jax.Array, bits: int, parts: int) -> list[jax.Array]:
    found = []
    for _ in range(parts):
        found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits))
        x = x - found[-1]
    return found
