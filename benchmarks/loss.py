"""The fused loss against plain JAX, a checkpointed scan, torch and other fused losses, in one run.

The mean loss and its gradients for the hidden states and the head: float32 on a CPU, bfloat16 on an
accelerator; on a GPU each program in a process of its own. Error is against float64. Programs that are not
installed, or do not run on this backend, are skipped and named. Temporary memory is XLA's number or, for
torch on a GPU, the allocator's peak above what stays allocated.
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

from benchmarks.isolated import FailedError, measure
from benchmarks.report import Report, show
from llama_jax.loss import default_chunk, fused_linear_cross_entropy
from parity_tests.harness.nvidia import device_kind
from train.hardware.flops import matmul_flops

ROUNDS = 7


class Size(NamedTuple):
    """Tokens, hidden size, vocabulary and dtype."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str


class Row(NamedTuple):
    """One program: its matmuls in units of 2 T H V FLOPs, its temporary bytes, and one step."""

    units: str
    memory: Callable[[], int | None]
    run: Callable[[], Any]


class Measured(NamedTuple):
    """Of one program; errors of the loss and both gradients, [] if not computed."""

    units: str
    memory: int | None
    seconds: float
    errors: list[float]


CPU = Size(2048, 1024, 16000, "float32")
GPU = Size(32768, 2560, 128256, "bfloat16")
TINY = Size(64, 32, 211, "bfloat16")


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


JAX_PROGRAMS = {"naive": naive, "checkpointed scan": checkpointed, "ours": ours}
NAMES = (
    *JAX_PROGRAMS,
    *("tokamax", "torch F.cross_entropy", "torch F.linear_cross_entropy"),
    *("torch.compile F.cross_entropy", "Liger"),
)


def main() -> None:
    """Print the table."""
    kind = device_kind()
    if kind is not None:
        show(gpu_report(kind))
        return
    size = CPU if jax.default_backend() == "cpu" else GPU
    show(time_together(size))


def time_together(size: Size) -> Report:
    """All programs in this process, alternating, with their errors against float64."""
    hidden, kernel, labels = operands(size)
    exact = float64_loss(hidden, kernel, labels)
    rows, skipped = programs(size)
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
    measured = {
        name: Measured(
            row.units,
            row.memory(),
            statistics.median(times[name]),
            relative_errors(results[name], exact),
        )
        for name, row in rows.items()
    }
    return tabulate(size, measured, skipped, jax.devices()[0].device_kind)


def gpu_report(kind: str, size: Size = GPU) -> Report:
    """Every program in a process of its own; without errors, which `make gpu` tests at smaller sizes."""
    measured, skipped = {}, {}
    for name in NAMES:
        try:
            measured[name] = Measured(*measure("loss:time_alone", size, name))
        except FailedError as error:
            skipped[name] = str(error)
    return tabulate(size, measured, skipped, kind)


def time_alone(size: list[Any], name: str) -> Measured:
    """One program, the only one in this process."""
    rows, skipped = programs(Size(*size), name)
    if name not in rows:
        raise RuntimeError(skipped.get(name, "does not run here"))
    row = rows[name]
    row.run()
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        row.run()
        times.append(time.perf_counter() - begin)
    return Measured(row.units, row.memory(), statistics.median(times), [])


def tabulate(
    size: Size, measured: dict[str, Measured], skipped: dict[str, str], kind: str
) -> Report:
    """Cost of every program, beside that of plain JAX."""
    base = measured["naive"].seconds if "naive" in measured else None
    rows = [
        [
            name,
            result.units,
            f"{result.memory / 2**20:.0f}" if result.memory is not None else "",
            f"{result.seconds * 1000:.1f}",
            f"{result.seconds / base:.2f}" if base else "",
            *(f"{error:.1e}" for error in result.errors),
            *([""] * (3 - len(result.errors))),
        ]
        for name, result in measured.items()
    ]
    return Report(
        f"loss and gradients, T={size.tokens} H={size.hidden} V={size.vocab} {size.dtype}, {kind}, "
        f"median of {ROUNDS}",
        (
            *("", "units", "temp MiB", "ms", "time / naive"),
            *("loss error", "hidden error", "kernel error"),
        ),
        rows,
        [f"skipped: {name} ({reason})" for name, reason in skipped.items()],
        [{"name": name} | result._asdict() for name, result in measured.items()],
    )


def operands(size: Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states, head and labels in float32."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((size.tokens, size.hidden), np.float32)
    kernel = rng.standard_normal((size.vocab, size.hidden), np.float32) / np.sqrt(size.hidden)
    labels = rng.integers(0, size.vocab, size.tokens).astype(np.int32)
    return hidden, kernel, labels


def programs(size: Size, only: str | None = None) -> tuple[dict[str, Row], dict[str, str]]:
    """The programs by name (or one of them), and what was skipped and why."""
    hidden, kernel, labels = operands(size)
    skipped: dict[str, str] = {}
    rows: dict[str, Row] = {}
    if only is None or only in (*JAX_PROGRAMS, "tokamax"):
        dtype = jnp.dtype(size.dtype)
        arguments = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), jnp.asarray(labels)
        for name, function in JAX_PROGRAMS.items():
            if only in (None, name):
                rows[name] = jax_row(function, arguments)
        if importlib.util.find_spec("tokamax") is None:
            skipped["tokamax"] = "not installed"
        elif only in (None, "tokamax"):
            transposed = arguments[0], arguments[1].T, arguments[2]
            rows["tokamax"] = jax_row(tokamax_loss, transposed)
    if only is None or only not in (*JAX_PROGRAMS, "tokamax"):
        torch_rows, torch_skipped = torch_programs(hidden, kernel, labels, size.dtype)
        rows |= torch_rows
        skipped |= torch_skipped
    return rows, skipped


def jax_row(function: Callable[..., jax.Array], arguments: tuple[jax.Array, ...]) -> Row:
    """Loss and both gradients by `function`, compiled; its FLOPs counted."""
    step = jax.value_and_grad(function, argnums=(0, 1))
    compiled = jax.jit(step).lower(*arguments).compile()
    analysis: Any = compiled.memory_analysis()
    flops = matmul_flops(jax.make_jaxpr(step)(*arguments).jaxpr)
    unit = 2 * arguments[0].shape[0] * arguments[1].size
    memory: int = analysis.temp_size_in_bytes
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
    hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray, dtype: str
) -> tuple[dict[str, Row], dict[str, str]]:
    """torch with explicit logits, eager and on a GPU compiled; its fused loss; on a GPU also Liger's.

    Returns the rows, and what was skipped and why, by name.
    """
    if importlib.util.find_spec("torch") is None:
        return {}, {"torch": "not installed"}
    import torch

    cross_entropy = torch.nn.functional.cross_entropy
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    kind = getattr(torch, dtype)
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

    peaks: dict[str, int | None] = dict.fromkeys(losses)

    def step(name: str) -> tuple[Any, ...]:
        h.grad = k.grad = None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        value = losses[name](h, k, target)
        value.backward()
        result: tuple[Any, ...] = (value.detach(), h.grad, k.grad)
        if on_gpu:
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        return result

    rows = {}
    for name in losses:
        rows[name] = Row("", partial(peaks.__getitem__, name), partial(step, name))
    return rows, skipped
