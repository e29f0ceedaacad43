"""A training step against torch's: loss, gradients, clipping and AdamW.

On a CPU: 56M parameters, 4 x 512 tokens, computing in float32 and in bfloat16 on float32 weights; all
programs in one process, alternating. On a GPU: packed rows of 8192 tokens (ours have segment ids) in
bfloat16 on float32 weights; each program in a process of its own. Memory is what a step needs beyond
weights and optimizer state: XLA's temporary buffers, and torch's peak by its profiler or allocator. What
cannot run here is skipped and named.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.isolated import FailedError, measure
from benchmarks.report import Report, show
from llama_jax import PRESETS, LlamaConfig
from llama_jax.cli.startup import keep_freed_memory
from llama_jax.inspection.architecture import forward_flops_per_token
from llama_jax.numerics.remat import Remat
from llama_jax.numerics.xla_options import leave_loops_rolled
from parity_tests.harness.nvidia import device_kind
from train.data.batch import Batch
from train.hardware.chips import CHIPS
from train.options import Dtype, ModelOptions, RunOptions
from train.program.build import initial_opt_state, initial_params, run_program

ROUNDS = 5
PROGRAMS = ("ours", "torch eager", "torch.compile")


class Workload(NamedTuple):
    """Model and batch. layers: of the preset's layers, how many; None for all."""

    preset: str
    rows: int
    seq: int
    dtypes: tuple[Dtype, ...] = ("bfloat16",)
    layers: int | None = None
    remat: Remat = "dots"

    @property
    def config(self) -> LlamaConfig:
        config = PRESETS[self.preset]
        return config if self.layers is None else replace(config, num_hidden_layers=self.layers)

    @property
    def name(self) -> str:
        layers = "" if self.layers is None else f", {self.layers} layers"
        return f"{self.preset}{layers}, {self.seq} tokens"


CPU = Workload("small-56m", 4, 512, ("float32", "bfloat16"))
# what fits an 80 GB card with AdamW in float32
GPU = (
    Workload("llama-3.2-1b", 2, 8192, remat="none"),
    Workload("llama-3.1-8b", 1, 8192, layers=8, remat="none"),
)
TINY = (Workload("tiny-4m", 2, 64),)


class Row(NamedTuple):
    """One program: a step that returns the loss, and the bytes that it needs meanwhile."""

    name: str
    dtype: str
    step: Callable[[], float]
    memory: int


class Timing(NamedTuple):
    """The median of one program's steps of `rows` rows."""

    name: str
    dtype: str
    rows: int
    seconds: float
    memory: int


def token_ids(workload: Workload) -> np.ndarray:
    shape = workload.rows, workload.seq
    vocab = workload.config.vocab_size
    return np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)


def our_step(workload: Workload, dtype: Dtype) -> Row:
    """The step of `python -m train run`, including clipping and packed segments."""
    options = RunOptions(
        batch_size=workload.rows,
        sequence_length=workload.seq,
        model=ModelOptions(preset=workload.preset, compute_dtype=dtype, remat=workload.remat),
    )
    program = run_program(options, workload.config, jax.devices()[:1])
    ids = token_ids(workload)
    positions = np.broadcast_to(np.arange(workload.seq, dtype=np.int32), ids.shape)
    arrays: list[Any] = [ids, np.roll(ids, -1, axis=1), np.zeros_like(ids), positions]
    windows = Batch(*arrays)
    with jax.set_mesh(program.mesh):
        params = initial_params(program, seed=0)
        state = [params, initial_opt_state(program, params)]
        batch = jax.tree.map(
            lambda values, like: jax.device_put(values[None], like.sharding), windows, program.batch
        )
        compiled = program.step.lower(*state, batch, None).compile()
    del params
    analysis: Any = compiled.memory_analysis()

    def run() -> float:
        *state[:], metrics = compiled(*state, batch, None)
        return float(jax.block_until_ready((state, metrics))[1].loss)

    return Row("ours", dtype, run, analysis.temp_size_in_bytes)


def torch_step(workload: Workload, dtype: str, compiled: bool) -> Row:
    """Hugging Face's model with `sdpa`, autocast for bfloat16, torch's fused AdamW."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(**workload.config.to_dict(), attn_implementation="sdpa")
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).train()
    program = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = torch.from_numpy(token_ids(workload).astype(np.int64)).to(device)
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


def make_step(workload: Workload, name: str, dtype: Dtype) -> Row:
    """One of `PROGRAMS`."""
    if name == "ours":
        return our_step(workload, dtype)
    return torch_step(workload, dtype, compiled=name == "torch.compile")


def time_steps(rows: list[Row]) -> list[float]:
    """Median seconds of each; alternating, so that drift affects all alike."""
    for row in rows:
        row.step()
    times: list[list[float]] = [[] for _ in rows]
    for _ in range(ROUNDS):
        for row, seconds in zip(rows, times, strict=True):
            begin = time.perf_counter()
            row.step()
            seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in times]


def time_alone(workload: list[Any], name: str, dtype: Dtype) -> dict[str, Any]:
    """A `Timing` of one program, the only one in this process."""
    shape = Workload(*workload)
    row = make_step(shape, name, dtype)
    (seconds,) = time_steps([row])
    return Timing(name, dtype, shape.rows, seconds, row.memory)._asdict()


def time_isolated(workload: Workload, name: str, dtype: Dtype) -> Timing:
    """The same in another process, with half the rows as often as memory does not suffice."""
    while True:
        try:
            return Timing(**measure("step:time_alone", workload, name, dtype))
        except FailedError as error:
            if workload.rows == 1 or not error.out_of_memory:
                raise
            workload = workload._replace(rows=workload.rows // 2)


def time_together(workload: Workload) -> tuple[list[Timing], list[str]]:
    """All programs in this process, and what was skipped."""
    rows, skipped = [], []
    for dtype in workload.dtypes:
        for name in PROGRAMS:
            if name != "ours" and find_spec("transformers") is None:
                skipped.append(f"{name} {dtype}: transformers is not installed")
                continue
            try:
                rows.append(make_step(workload, name, dtype))
            except Exception as error:  # no C++ compiler, or an unsuitable one
                if name != "torch.compile":
                    raise
                skipped.append(f"{name} {dtype}: {str(error).splitlines()[0]}")
    medians = time_steps(rows)
    timings = [
        Timing(row.name, row.dtype, workload.rows, seconds, row.memory)
        for row, seconds in zip(rows, medians, strict=True)
    ]
    return timings, skipped


def time_each(workload: Workload) -> tuple[list[Timing], list[str]]:
    """Every program in a process of its own, and what was skipped."""
    timings, skipped = [], []
    for dtype in workload.dtypes:
        for name in PROGRAMS:
            try:
                timings.append(time_isolated(workload, name, dtype))
            except FailedError as error:
                skipped.append(f"{name} {dtype}: {error}")
    return timings, skipped


def tabulate(workload: Workload, timings: list[Timing], skipped: list[str], kind: str) -> Report:
    """Speed and memory, beside torch's."""
    chip = CHIPS.get(kind)
    flops = 3 * forward_flops_per_token(workload.config, workload.seq)
    rows, values = [], []
    for timing in timings:
        speed = timing.rows * workload.seq / timing.seconds
        mfu = flops * speed / chip.flops if chip else None
        base = next(
            (t for t in timings if (t.name, t.dtype) == ("torch eager", timing.dtype)), None
        )
        speed_of_base = base.rows * workload.seq / base.seconds if base else None
        rows.append(
            [
                timing.name,
                timing.dtype,
                f"{timing.rows}",
                f"{timing.seconds:.3f}",
                f"{speed:.0f}",
                f"{speed / speed_of_base:.2f}" if speed_of_base else "",
                f"{timing.memory / 2**20:.0f}",
                f"{timing.memory / base.memory:.2f}" if base else "",
                f"{mfu:.1%}" if mfu else "",
            ]
        )
        values.append(timing._asdict() | {"tokens_per_second": speed, "mfu": mfu})
    columns = (
        "",
        "compute",
        "rows",
        "seconds",
        "tokens/s",
        "/ torch eager",
        "MiB",
        "/ torch eager",
    )
    return Report(
        f"training step, {workload.name}, {kind}, median of {ROUNDS}",
        (*columns, "MFU"),
        rows,
        [
            "MFU: 3 x tokens x (2 x weights in matmuls + 2 x layers x heads x dim x (seq + 1)), causal",
            *(f"skipped: {line}" for line in skipped),
        ],
        values,
    )


def gpu_reports(kind: str, workloads: tuple[Workload, ...] = GPU) -> Iterator[Report]:
    """A table for each workload; this process leaves the GPU alone."""
    for workload in workloads:
        yield tabulate(workload, *time_each(workload), kind)


def main() -> None:
    """Print the tables."""
    # as `train run` does; torch gains as much by the first
    keep_freed_memory()
    leave_loops_rolled()
    kind = device_kind()
    if kind is not None:
        for report in gpu_reports(kind):
            show(report)
        return
    workload = CPU if jax.default_backend() == "cpu" else GPU[0]
    show(tabulate(workload, *time_together(workload), jax.devices()[0].device_kind))


if __name__ == "__main__":
    main()
