"""The fused loss against plain JAX, a checkpointed scan, torch and other fused losses, in one run.

The mean loss and its gradients for the hidden states and the head: float32 on a CPU, bfloat16 on an
accelerator. Error is against float64. Programs that are not installed, or do not run on this backend, are
skipped and named. Temporary memory is XLA's number or, for torch on a GPU, the allocator's peak above what
stays allocated.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from llama_jax import formatting
from llama_jax.loss import default_chunk, fused_linear_cross_entropy
from train.hardware.flops import matmul_flops

ROUNDS = 7


def sizes() -> tuple[int, int, int, Any]:
    """Tokens, hidden size, vocabulary and dtype that suit the backend."""
    if jax.default_backend() == "cpu":
        return 2048, 1024, 16000, jnp.float32
    return 8192, 4096, 128256, jnp.bfloat16


def naive(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Plain JAX: float32 logits of every token."""
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
    """`fused_linear_cross_entropy`, with the chunk that it chooses."""
    return fused_linear_cross_entropy(hidden, kernel, labels).loss


def main() -> None:
    """Print the table."""
    tokens, size, vocab, dtype = sizes()
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, size), np.float32)
    kernel = rng.standard_normal((vocab, size), np.float32) / np.sqrt(size)
    labels = rng.integers(0, vocab, tokens).astype(np.int32)
    exact = float64_loss(hidden, kernel, labels)
    arguments = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), jnp.asarray(labels)

    rows: dict[str, Row] = {}
    functions = {"naive": naive, "checkpointed scan": checkpointed, "ours": ours}
    skipped = {}
    for name, function in functions.items():
        rows[name] = jax_row(function, arguments)
    if importlib.util.find_spec("tokamax") is None:
        skipped["tokamax"] = "not installed"
    else:
        rows["tokamax"] = jax_row(tokamax_loss, (arguments[0], arguments[1].T, arguments[2]))
    torch_rows, torch_skipped = torch_programs(hidden, kernel, labels, dtype)
    rows |= torch_rows
    skipped |= torch_skipped

    results = {}
    for name in list(rows):
        try:
            results[name] = rows[name].run()  # compiles, and gives the errors
        except Exception as error:  # one that cannot run here must not end the benchmark
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            del rows[name]
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, row in rows.items():  # alternating: drift affects all alike
            begin = time.perf_counter()
            row.run()
            times[name].append(time.perf_counter() - begin)
    base = statistics.median(times["naive"])
    table = Table(
        title=f"loss and gradients, T={tokens} H={size} V={vocab} {jnp.dtype(dtype)}, "
        f"{jax.devices()[0].device_kind}, median of {ROUNDS}"
    )
    columns = (
        "",
        "units",
        "temp MiB",
        "time / naive",
        "loss error",
        "hidden error",
        "kernel error",
    )
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        errors = [f"{error:.1e}" for error in relative_errors(results[name], exact)]
        ratio = f"{statistics.median(times[name]) / base:.2f}"
        table.add_row(name, row.units, row.memory(), ratio, *errors)
    console = formatting.console(width=110)
    console.print(table)
    for name, reason in skipped.items():
        console.print(f"skipped: {name} ({reason})")


class Row(NamedTuple):
    """One program: its matmuls in units of 2 T H V FLOPs, its temporary memory in MiB, and one step."""

    units: str
    memory: Callable[[], str]
    run: Callable[[], Any]


def jax_row(function: Callable[..., jax.Array], arguments: tuple[jax.Array, ...]) -> Row:
    """Loss and both gradients by `function`, compiled; its FLOPs counted."""
    step = jax.value_and_grad(function, argnums=(0, 1))
    compiled = jax.jit(step).lower(*arguments).compile()
    analysis: Any = compiled.memory_analysis()
    flops = matmul_flops(jax.make_jaxpr(step)(*arguments).jaxpr)
    unit = 2 * arguments[0].shape[0] * arguments[1].size
    memory = f"{analysis.temp_size_in_bytes / 2**20:.0f}"
    return Row(f"{flops / unit:.2f}", lambda: memory, partial(until_ready, compiled, *arguments))


def tokamax_loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """tokamax's loss, which takes the head as [H, V]: a kernel on TPUs, plain XLA elsewhere."""
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(hidden, labels, kernel, reduction="mean")


def until_ready(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, after waiting for it."""
    return jax.block_until_ready(function(*arguments))


def float64_loss(hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Loss and both gradients, by numpy."""
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


def relative_errors(result: Any, exact: list[np.ndarray]) -> list[float]:
    """rms error of loss and gradients, over their rms; the gradient of the kernel may be transposed."""
    flat = [on_host(leaf) for leaf in jax.tree.leaves(result)]
    pairs = [(a if a.shape == b.shape else a.T, b) for a, b in zip(flat, exact, strict=True)]
    return [float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for a, b in pairs]


def on_host(value: Any) -> np.ndarray:
    """A jax array or torch tensor as float64 numpy."""
    plain = value.detach().float().cpu().numpy() if hasattr(value, "detach") else value
    return np.asarray(plain, np.float64)


def torch_programs(
    hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray, dtype: Any
) -> tuple[dict[str, Row], dict[str, str]]:
    """torch with explicit logits, eager and on a GPU compiled; its fused loss; on a GPU also Liger's.

    Returns the rows, and what was skipped and why, by name.
    """
    if importlib.util.find_spec("torch") is None:
        return {}, {"torch": "not installed"}
    import torch

    cross_entropy = torch.nn.functional.cross_entropy
    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    device = "cuda" if on_gpu else "cpu"
    kind = torch.float32 if dtype == jnp.float32 else torch.bfloat16
    h = torch.from_numpy(hidden).to(device, kind).requires_grad_()
    k = torch.from_numpy(kernel).to(device, kind).requires_grad_()
    target = torch.from_numpy(labels.astype(np.int64)).to(device)

    def explicit(h: Any, k: Any, target: Any) -> Any:
        return cross_entropy((h @ k.T).float(), target)

    losses: dict[str, Callable[..., Any]] = {"torch F.cross_entropy": explicit}
    skipped: dict[str, str] = {}
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is not None:
        losses["torch F.linear_cross_entropy"] = fused
    if on_gpu:
        losses["torch.compile F.cross_entropy"] = torch.compile(explicit)
    if not on_gpu:
        skipped |= dict.fromkeys(("torch.compile", "Liger"), "no GPU")
    elif importlib.util.find_spec("liger_kernel") is None:
        skipped["Liger"] = "not installed"
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        losses["Liger"] = lambda h, k, target: liger(k, h, target)

    peaks: dict[str, str] = dict.fromkeys(losses, "")

    def step(name: str) -> tuple[Any, ...]:
        h.grad = k.grad = None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        value = losses[name](h, k, target)
        value.backward()
        result: tuple[Any, ...] = (value.detach(), h.grad, k.grad)
        if on_gpu:
            torch.cuda.synchronize()
            above = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            peaks[name] = f"{above / 2**20:.0f}"
        return result

    rows = {}
    for name in losses:
        rows[name] = Row("", partial(peaks.__getitem__, name), partial(step, name))
    return rows, skipped
