"""One run over meshes and processes: the same data and losses, resumed on any of them.

In float64, where the order of summation, which is all that a mesh changes, matters far less than a bug.
"""

from __future__ import annotations

import functools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from parity_tests.reference.errors import relative_error
from parity_tests.train.runs import (
    ROOT,
    Tiny,
    environment,
    joined_flags,
    metrics_of,
    run_flags,
    same_bits,
    saved_steps,
    start,
    state_of,
)
from train.checkpoints import FOLDER
from train.run.stop import RESUME

# Reordering a sum of n numbers changes it by at most n * 1e-16, relatively; 50 steps amplify that.
REDUCTION_ORDER = {"float64": 1e-12, "float32": 1e-5}


class Layout(NamedTuple):
    processes: int
    devices: int
    """of each process"""
    mesh: dict[str, int | str]


LAYOUTS = {
    "single": Layout(1, 1, {}),
    "data8": Layout(1, 8, {"data": 8}),
    "two-processes-data8": Layout(2, 4, {"data": 8}),
    "fsdp4-tensor2": Layout(1, 8, {"fsdp": 4, "tensor": 2}),
    "two-processes-fsdp4-tensor2": Layout(2, 4, {"fsdp": 4, "tensor": 2}),
    "sequence2-fsdp2-tensor2": Layout(1, 8, {"fsdp": 2, "sequence": 2, "tensor": 2}),
    "two-processes-sequence4-data2": Layout(2, 4, {"data": 2, "sequence": 4}),
    "stage2-fsdp2-tensor2": Layout(1, 8, {"stage": 2, "fsdp": 2, "tensor": 2}),
    "stage2-sequence2-tensor2": Layout(1, 8, {"stage": 2, "sequence": 2, "tensor": 2}),
    "two-processes-stage2-data4": Layout(2, 4, {"stage": 2, "data": 4, "stage-micro-batches": 2}),
    "sequence4-contiguous": Layout(1, 4, {"sequence": 4, "sequence-order": "contiguous"}),
}


def begin(
    tiny: Tiny, layout: Layout, arguments: list[str], record: Path
) -> list[subprocess.Popen[str]]:
    """Start the command in every process of the layout; each records its tokens."""
    flags = [f"--mesh.{axis}={size}" for axis, size in layout.mesh.items()]
    processes = []
    for number, joined in enumerate(joined_flags(layout.processes)):
        command = [
            *(sys.executable, "-m", "parity_tests.train.run.recorded_run"),
            *(f"{record}-{number}.npz", *arguments, *flags),
            *(joined if layout.processes > 1 else ()),
        ]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(tiny.cache, layout.devices),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def end(processes: list[subprocess.Popen[str]], code: int = 0) -> None:
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), errors


def tokens(record: Path, processes: int) -> dict[int, np.ndarray]:
    """The global batch of every step, assembled from all processes; -1 where no process has it."""
    parts = [np.load(f"{record}-{number}.npz") for number in range(processes)]
    assert all(set(part) == set(parts[0]) for part in parts)
    return {int(step): np.max([part[step] for part in parts], axis=0) for step in parts[0]}


def same_tokens(tokens: dict[int, np.ndarray], reference: dict[int, np.ndarray]) -> None:
    """Those of the steps in `tokens`, which may begin later."""
    assert tokens
    assert all(np.array_equal(ids, reference[step]) for step, ids in tokens.items())
    assert max(tokens) >= max(reference) - 4  # batches are prefetched, but not all are used


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run) if "loss" in line]


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of any metric of any step or evaluation."""
    rows = zip(metrics_of(one), metrics_of(other), strict=True)
    pairs = [(a, b) for a, b in rows if a.keys() == b.keys()]
    assert len(pairs) == len(metrics_of(one))
    return max(
        abs(a[name] - b[name]) / max(abs(b[name]), 1e-300)
        for a, b in pairs
        for name in a
        if a[name] != b[name]
    ) if any(a != b for a, b in pairs) else 0.0  # fmt: skip


Runner = Callable[..., Path]


def options(dtype: str, **changes: Any) -> dict[str, Any]:
    return {
        "model__parameter_dtype": dtype,
        "model__compute_dtype": dtype,
        "batch_size": 16,
        "micro_batches": 2,
        "checkpoint__every": 4,
        "checkpoint__keep_last": 9,
    } | changes


@pytest.fixture(scope="module")
def full_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """`full_run(name, dtype, steps)`: the folder of the uninterrupted run on that layout."""

    @functools.cache
    def run(name: str, dtype: str, steps: int) -> Path:
        out = tmp_path_factory.mktemp(name) / "run"
        flags = run_flags(tiny, out, **options(dtype, steps=steps))
        end(begin(tiny, LAYOUTS[name], flags, out.with_name("ids")))
        return out

    return run


def resumed_copy(tiny: Tiny, run: Path, layout: Layout, tmp_path: Path, steps_done: int) -> Path:
    """A copy of the run as it was after `steps_done` steps, resumed on the layout."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for step in saved_steps(copy):
        if step > steps_done:
            shutil.rmtree(copy / FOLDER / str(step))
    axes = {"stage": 1, "data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | layout.mesh
    joined = [
        "--distributed.coordinator=None",
        "--distributed.processes=None",
        "--distributed.process-id=None",
    ]
    arguments = ["resume", str(copy), *(joined if layout.processes == 1 else ())]
    end(begin(tiny, layout._replace(mesh=axes), arguments, tmp_path / "ids"))
    return copy


def test_two_processes_then_resumed_with_one(tiny: Tiny, full_run: Runner, tmp_path: Path) -> None:
    """fsdp 4 x tensor 2, then stage 2 x sequence 2 x tensor 2: the losses are those of one device."""
    single = full_run("single", "float64", 12)
    two = full_run("two-processes-fsdp4-tensor2", "float64", 12)
    assert losses(single)[-1] < losses(single)[0] - 0.05
    error = difference(two, single)
    print(f"two processes: {error:.1e}")
    assert 0 < error <= REDUCTION_ORDER["float64"]
    ids = tokens(single.with_name("ids"), 1)
    same_tokens(tokens(two.with_name("ids"), 2), ids)

    other = resumed_copy(tiny, two, LAYOUTS["stage2-sequence2-tensor2"], tmp_path, steps_done=8)
    error = difference(other, single)
    print(f"resumed with one: {error:.1e}")
    assert 0 < error <= REDUCTION_ORDER["float64"]
    resumed = tokens(tmp_path / "ids", 1)
    assert min(resumed) == 8
    same_tokens(resumed, ids)
    for a, b in zip(state_of_float64(other, 12), state_of_float64(single, 12), strict=True):
        assert relative_error(a, b) <= REDUCTION_ORDER["float64"]


def state_of_float64(run: Path, step: int) -> list[np.ndarray]:
    import jax

    with jax.enable_x64(True):
        return state_of(run, step)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "single"])
def test_fifty_steps(full_run: Runner, name: str, dtype: str) -> None:
    single, run = full_run("single", dtype, 50), full_run(name, dtype, 50)
    error = difference(run, single)
    print(f"{name} {dtype}: {error:.1e}")
    assert 0 < error <= REDUCTION_ORDER[dtype]
    ids = tokens(single.with_name("ids"), 1)
    assert set(ids) >= set(range(50))
    same_tokens(tokens(run.with_name("ids"), LAYOUTS[name].processes), ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("single", "sequence2-fsdp2-tensor2", "two-processes-fsdp4-tensor2"),
        *("stage2-fsdp2-tensor2", "two-processes-stage2-data4"),
    ],
)
def test_resumed_on_the_same_layout_bit_for_bit(
    tiny: Tiny, full_run: Runner, tmp_path: Path, name: str
) -> None:
    run = full_run(name, "float32", 50)
    copy = resumed_copy(tiny, run, LAYOUTS[name], tmp_path, steps_done=24)
    assert metrics_of(copy) == metrics_of(run)
    assert same_bits(state_of(copy, 50), state_of(run, 50))


@pytest.mark.slow
def test_from_a_pipeline_to_one_device(tiny: Tiny, full_run: Runner, tmp_path: Path) -> None:
    single, piped = (
        full_run("single", "float64", 50),
        full_run("stage2-fsdp2-tensor2", "float64", 50),
    )
    copy = resumed_copy(tiny, piped, LAYOUTS["single"], tmp_path, steps_done=24)
    error = difference(copy, single)
    print(f"resumed without a pipeline: {error:.1e}")
    assert 0 < error <= REDUCTION_ORDER["float64"]


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both(
    tiny: Tiny, full_run: Runner, tmp_path: Path
) -> None:
    layout = LAYOUTS["two-processes-fsdp4-tensor2"]
    run = tmp_path / "run"
    flags = run_flags(tiny, run, **options("float32", steps=50))
    processes = begin(tiny, layout, flags, tmp_path / "ids")
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 9:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    end(processes, RESUME)
    last = saved_steps(run)[-1]
    assert 9 <= last < 50
    expected = full_run("two-processes-fsdp4-tensor2", "float32", 50)
    copy = resumed_copy(tiny, run, layout, tmp_path / "copy", steps_done=last)
    assert metrics_of(copy) == metrics_of(expected)
    assert same_bits(state_of(copy, 50), state_of(expected, 50))


def test_a_batch_that_the_mesh_does_not_divide(tiny: Tiny, tmp_path: Path) -> None:
    flags = run_flags(tiny, tmp_path / "run", batch_size=12)
    process = start(flags, environment(tiny.cache, 8))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err == (
        "error: batch-size: found 12 rows in a micro-batch, expected a multiple of data x fsdp = 8\n"
    )
    assert not (tmp_path / "run").exists()
