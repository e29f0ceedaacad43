"""A run of several processes of which one dies: the others end, each with one line, within a minute."""

from __future__ import annotations

import io
import signal
import subprocess
import time
from pathlib import Path

import pytest

from parity_tests.train.runs import Tiny, environment, joined_flags, run_flags, start
from train.monitoring.metrics_log import FILE as METRICS
from train.run.runtime_messages import pass_on

LINE = b"error: process 0 of the run has died or cannot be reached; do this\n"
HEARTBEATS = b"""\
E1127 10:57:28.425168    5040 coordination_service.cc:1549] [59] Use error polling: UNAVAILABLE: \
The following tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed. Check the task logs for an earlier error.
F1127 10:57:28.426008    5051 client.h:80] Terminating process because the JAX distributed service detected\
 fatal errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
3
The tasks have crashed.

RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7f7618640634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
LEADER = b"""\
F1127 10:57:43.158958    6092 client.h:80] Terminating process because the JAX distributed service detected\
 fatal errors. absl::Status: UNAVAILABLE: Failed to send RPC to coordination service.
:UNKNOWN:Error received from peer  {grpc_message:"Socket closed", grpc_status:14}
*** Check failure stack trace: ***
    @     0x7fbede640634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
OTHER = b"""\
W1127 10:57:43.158958    6092 other.cc:80] A warning
of two lines
E1127 10:57:43.158958    6092 coordination_service_agent.cc:80] An error that ends nothing
F1127 10:57:43.158958    6092 other.cc:80] Check failed: a == b
*** Check failure stack trace: ***
"""


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (HEARTBEATS, b"error: processes 1, 3 have died or cannot be reached; do this\n"),
        (LEADER, LINE),
        (b"before\n" + LEADER, b"before\n" + LINE),
        (OTHER, OTHER),
        (b"no newline", b"no newline"),
        (b"", b""),
    ],
)  # fmt: skip
def test_what_the_runtime_says_becomes_one_line(messages: bytes, expected: bytes) -> None:
    out = io.BytesIO()
    pass_on(io.BytesIO(messages), out, "do this")
    assert out.getvalue() == expected


def wait_for_steps(run: Path, processes: list[subprocess.Popen[str]]) -> None:
    file = run / METRICS
    while not file.exists() or file.read_bytes().count(b"\n") < 5:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (1, signal.SIGKILL),
        # process 0 is where the others meet
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_the_others_end(tiny: Tiny, tmp_path: Path, victim: int, number: signal.Signals) -> None:
    run = tmp_path / "run"
    flags = run_flags(tiny, run, steps=10**6, checkpoint__every=10**5, evaluation__every=0)
    joined = joined_flags(2)
    processes = [start([*flags, *more], environment(tiny.cache)) for more in joined]
    try:
        wait_for_steps(run, processes)
        processes[victim].send_signal(number)
        err = processes[1 - victim].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - victim].returncode not in (0, None)
    assert [line for line in err.splitlines() if "error" in line.lower()] == [
        f"error: process {victim} of the run has died or cannot be reached; start all again with: "
        f"python -m train resume {run}"
    ]
    assert "Traceback" not in err
    assert "***" not in err
