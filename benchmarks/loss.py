"""The loss-in-head beside its peers: memory, products, time and error, in one run.

Value and both gradients of the mean loss, float32 on the CPU and bfloat16 on an accelerator. Peers that
are not installed are left out and named.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from llama_jax.loss import default_chunk, fused_linear_cross_entropy

ROUNDS = 7


def sizes() -> tuple[int, int, int, Any]:
    """Tokens, hidden, vocabulary and dtype that suit the backend."""
    if jax.default_backend() == "cpu":
        return 2048, 1024, 16000, jnp.float32
    return 8192, 4096, 128256, jnp.bfloat16


def naive(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """The plain program: float32 logits of every token."""
    logits = jnp.einsum("th,vh->tv", hidden, kernel, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def checkpointed(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """The usual remedy: a scan over chunks of tokens, each recomputed in the backward pass."""
    chunk = min(default_chunk(kernel.shape[0]), hidden.shape[0])

    @jax.checkpoint
    def body(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + naive(part[0], kernel, part[1]) * chunk, None

    parts = hidden.reshape(-1, chunk, hidden.shape[1]), labels.reshape(-1, chunk)
    return jax.lax.scan(body, jnp.zeros(()), parts)[0] / hidden.shape[0]


def ours(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """fused_linear_cross_entropy as it chooses its chunk."""
    return fused_linear_cross_entropy(hidden, kernel, labels).loss


def main() -> None:
    """Print the table."""
    tokens, size, vocab, dtype = sizes()
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, size), np.float32)
    kernel = rng.standard_normal((vocab, size), np.float32) / np.sqrt(size)
    labels = rng.integers(0, vocab, tokens).astype(np.int32)
    truth = exact(hidden, kernel, labels)
    arguments = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), jnp.asarray(labels)

    rows: dict[str, tuple[str, Callable[[], Any]]] = {}
    for name, function in (("naive", naive), ("checkpointed scan", checkpointed), ("ours", ours)):
        step = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        compiled = step.lower(*arguments).compile()
        analysis: Any = compiled.memory_analysis()
        memory = f"{analysis.temp_size_in_bytes / 2**20:.0f}"
        rows[name] = memory, partial(finished, compiled, *arguments)
    rows |= torch_peers(hidden, kernel, labels, dtype)

    results = {name: run() for name, (_, run) in rows.items()}  # warms up, and gives the errors
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, (_, run) in rows.items():  # in turn, so that drift hits all alike
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    base = statistics.median(times["naive"])
    table = Table(
        title=f"loss and gradients, T={tokens} H={size} V={vocab} {jnp.dtype(dtype)}, "
        f"{jax.devices()[0].device_kind}, median of {ROUNDS}"
    )
    columns = ("", "temp MiB", "time / naive", "loss error", "hidden error", "kernel error")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for name, (memory, _) in rows.items():
        errors = [f"{error:.1e}" for error in relative_errors(results[name], truth)]
        ratio = f"{statistics.median(times[name]) / base:.2f}"
        table.add_row(name, memory, ratio, *errors)
    console = Console(width=110)
    console.print(table)
    missing = [n for n in ("tokamax", "liger_kernel") if importlib.util.find_spec(n) is None]
    if missing:
        console.print(f"not installed, left out: {', '.join(missing)}")


def finished(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, computed to the end."""
    return jax.block_until_ready(function(*arguments))


def exact(hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Loss and gradients in float64, numpy."""
    h, k = hidden.astype(np.float64), kernel.astype(np.float64)
    logits = h @ k.T
    logits -= logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits).sum(-1))
    rows = np.arange(len(labels))
    loss = np.mean(lse - logits[rows, labels])
    p = np.exp(logits - lse[:, None])
    p[rows, labels] -= 1
    p /= len(labels)
    return [np.asarray(loss), p @ k, p.T @ h]


def relative_errors(result: Any, truth: list[np.ndarray]) -> list[float]:
    """rms error of each number over its rms."""
    flat = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(result)]
    pairs = zip(flat, truth, strict=True)
    return [float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for a, b in pairs]


def torch_peers(
    hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray, dtype: Any
) -> dict[str, tuple[str, Callable[[], Any]]]:
    """torch's cross-entropy of explicit logits and, where torch has it, its fused one."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    kind = torch.float32 if dtype == jnp.float32 else torch.bfloat16
    h = torch.from_numpy(hidden).to(device, kind).requires_grad_()
    k = torch.from_numpy(kernel).to(device, kind).requires_grad_()
    target = torch.from_numpy(labels.astype(np.int64)).to(device)
    losses: dict[str, Callable[[], Any]] = {
        "torch F.cross_entropy": lambda: torch.nn.functional.cross_entropy(
            (h @ k.T).float(), target
        )
    }
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is not None:
        losses["torch F.linear_cross_entropy"] = lambda: fused(h, k, target)

    def step(loss: Callable[[], Any]) -> tuple[Any, ...]:
        h.grad = k.grad = None
        value = loss()
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        found: tuple[Any, ...] = (value, h.grad, k.grad)
        return tuple(tensor.detach().float().cpu().numpy() for tensor in found)

    return {name: ("", partial(step, loss)) for name, loss in losses.items()}
