"""A training step against torch's: loss, gradients, clipping and AdamW, alternating in one process.

On a CPU: 56M parameters, batch 4 x 512, computing in float32 and in bfloat16 on float32 weights. On a GPU:
Llama 3.2 1B's shape, batch 1 x 4096, bfloat16. Memory is what a step needs beyond weights and optimizer
state: XLA's temporary buffers, and torch's peak by its profiler. What torch cannot run here is skipped and
named.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from llama_jax import PRESETS, formatting
from llama_jax.inspection.architecture import forward_flops_per_token
from train.data.placement import place_batch
from train.hardware.chips import CHIPS
from train.options import Dtype, ModelOptions, RunOptions
from train.program.build import initial_opt_state, initial_params, run_program

ROUNDS = 5


class Workload(NamedTuple):
    """Model and batch."""

    preset: str
    batch: int
    seq: int
    dtypes: tuple[Dtype, ...]


class Row(NamedTuple):
    """One program: a step that returns the loss, and the bytes that it needs meanwhile."""

    name: str
    dtype: str
    step: Callable[[], float]
    memory: int


def workload_for_backend() -> Workload:
    """The model and batch for the default backend."""
    if jax.default_backend() == "cpu":
        return Workload("small-56m", 4, 512, ("float32", "bfloat16"))
    return Workload("llama-3.2-1b", 1, 4096, ("bfloat16",))


def our_step(workload: Workload, ids: np.ndarray, dtype: Dtype) -> Row:
    """The step of `python -m train run`, including clipping and packed segments."""
    options = RunOptions(
        batch_size=workload.batch,
        sequence_length=workload.seq,
        model=ModelOptions(preset=workload.preset, compute_dtype=dtype),
    )
    program = run_program(options, PRESETS[workload.preset])
    with jax.set_mesh(program.mesh):
        params = initial_params(program, seed=0)
        state = [params, initial_opt_state(program, params)]
        rows = range(workload.batch)
        windows = {
            "input_ids": ids,
            "labels": np.roll(ids, -1, axis=1),
            "segment_ids": np.zeros_like(ids),
            "position_ids": np.broadcast_to(np.arange(workload.seq, dtype=np.int32), ids.shape),
        }
        batch = place_batch(program.batch, rows, windows)
        compiled = program.step.lower(*state, batch, None).compile()
    analysis: Any = compiled.memory_analysis()

    def run() -> float:
        *state[:], metrics = compiled(*state, batch, None)
        return float(jax.block_until_ready((state, metrics))[1].loss)

    return Row("ours", dtype, run, analysis.temp_size_in_bytes)


def torch_step(workload: Workload, ids: np.ndarray, dtype: str, compiled: bool) -> Row:
    """Hugging Face's model with `sdpa`, autocast for bfloat16, torch's fused AdamW."""
    import torch
    import transformers

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    config = transformers.LlamaConfig(
        **PRESETS[workload.preset].to_dict(), attn_implementation="sdpa"
    )
    model = transformers.LlamaForCausalLM(config).to(device).train()
    program = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = torch.from_numpy(ids.astype(np.int64)).to(device)
    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        with mixed:
            loss = program(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    run()  # allocates the moments
    optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        memory = torch.cuda.max_memory_allocated() - before
    else:
        memory = torch_cpu_peak(run)
    return Row("torch.compile" if compiled else "torch eager", dtype, run, memory)


def torch_cpu_peak(run: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator had handed out at any time during `run`."""
    import torch

    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.max(np.cumsum([size for _, size in memory])))


def main() -> None:
    """Print the table."""
    workload = workload_for_backend()
    config = PRESETS[workload.preset]
    shape = workload.batch, workload.seq
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    rows, skipped = [], []
    for dtype in workload.dtypes:
        rows.append(our_step(workload, ids, dtype))
        if importlib.util.find_spec("transformers") is None:
            skipped.append("torch: not installed")
            continue
        rows.append(torch_step(workload, ids, dtype, compiled=False))
        try:
            rows.append(torch_step(workload, ids, dtype, compiled=True))
        except Exception as error:  # no C++ compiler, or an unsuitable one
            skipped.append(f"torch.compile {dtype}: {str(error).splitlines()[0]}")

    for row in rows:
        row.step()
    times: list[list[float]] = [[] for _ in rows]
    for _ in range(ROUNDS):
        for row, seconds in zip(rows, times, strict=True):  # alternating: drift affects all alike
            begin = time.perf_counter()
            row.step()
            seconds.append(time.perf_counter() - begin)
    kind = jax.devices()[0].device_kind
    table = Table(
        title=f"training step, {workload.batch} x {workload.seq} tokens, {kind}, median of {ROUNDS}"
    )
    columns = ("", "compute", "seconds", "/ torch eager", "tokens/s", "MiB", "/ torch eager", "MFU")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    chip = CHIPS.get(kind)
    flops = 3 * forward_flops_per_token(config, workload.seq) * workload.batch * workload.seq
    for row, seconds in zip(rows, times, strict=True):
        median = statistics.median(seconds)
        base = next(
            (
                (statistics.median(other), peer.memory)
                for peer, other in zip(rows, times, strict=True)
                if (peer.name, peer.dtype) == ("torch eager", row.dtype)
            ),
            None,
        )
        table.add_row(
            row.name,
            row.dtype,
            f"{median:.3f}",
            f"{median / base[0]:.2f}" if base else "",
            f"{workload.batch * workload.seq / median:.0f}",
            f"{row.memory / 2**20:.0f}",
            f"{row.memory / base[1]:.2f}" if base else "",
            f"{flops / median / chip.flops:.1%}" if chip else "",
        )
    console = formatting.console(width=110)
    console.print(table)
    console.print(
        "MFU: 3 x tokens x (2 x weights in matmuls + 2 x layers x heads x dim x (seq + 1)), causal"
    )
    for line in skipped:
        console.print(f"skipped: {line}")


if __name__ == "__main__":
    main()
