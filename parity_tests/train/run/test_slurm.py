"""A run of two processes as SLURM's srun starts them, which is preempted and requeued."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from parity_tests.train.runs import (
    Tiny,
    environment,
    metrics_of,
    run_flags,
    same_bits,
    saved_steps,
    start,
    state_of,
)
from train.monitoring.metrics_log import FILE as METRICS
from train.run.stop import RESUME

STEPS = {
    "steps": 60,
    "evaluation__every": 0,
    "checkpoint__every": 50,
    "mesh__fsdp": 2,
    "mesh__data": 1,
}


def srun(tiny: Tiny, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Two tasks of a job step on this machine; JAX derives a port from the number of the job."""
    job = {
        "SLURM_JOB_ID": str(random.randrange(4096)),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    return [
        start(
            arguments,
            environment(tiny.cache) | job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
        )
        for task in range(2)
    ]


def end(tasks: list[subprocess.Popen[str]], code: int) -> None:
    try:
        errors = [task.communicate(timeout=300)[1] for task in tasks]
        assert [task.returncode for task in tasks] == [code] * 2, errors
    finally:
        for task in tasks:
            task.kill()


@pytest.mark.slow
def test_preempted_and_requeued(tiny: Tiny, tmp_path: Path) -> None:
    full, run = tmp_path / "full", tmp_path / "run"
    end(srun(tiny, [*run_flags(tiny, full, **STEPS), "--distributed.enabled"]), 0)
    tasks = srun(tiny, [*run_flags(tiny, run, **STEPS), "--distributed.enabled"])
    file = run / METRICS
    while not file.exists() or file.read_bytes().count(b"\n") < 5:
        assert all(task.poll() is None for task in tasks), tasks[0].communicate()
        time.sleep(0.01)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)  # as with --signal=USR1@300
    end(tasks, RESUME)
    assert 5 <= saved_steps(run)[-1] < 60
    end(srun(tiny, ["resume", str(run)]), 0)
    assert metrics_of(run) == metrics_of(full)
    assert same_bits(state_of(run, 60), state_of(full, 60))
