"""The time until the first step, --profile and --dump-hlo."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from parity_tests.train.runs import Tiny, metrics_of, run_flags, same_bits, state_of
from train.__main__ import main
from train.flags import step_range
from train.monitoring.history import read_events


def error_of(arguments: list[str], capfd: Any) -> str:
    assert main(arguments) == 2
    *_, last = capfd.readouterr().err.splitlines()
    return str(last)


def test_a_run_with_both(tiny: Tiny, finished: Path, tmp_path: Path, capfd: Any) -> None:
    """They change nothing in the run; the profile has the steps, in the format that xprof reads."""
    run, programs = tmp_path / "run", tmp_path / "programs"
    flags = [*run_flags(tiny, run), "--profile=3:4", f"--dump-hlo={programs}"]
    assert main(flags) == 0
    err = capfd.readouterr().err
    assert f"profile of steps 3 to 4: {run}/profile (open it with xprof)" in err
    assert metrics_of(run) == metrics_of(finished)
    assert same_bits(state_of(run, 12), state_of(finished, 12))

    (file,) = (run / "profile").rglob("*.xplane.pb")
    calls = [
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "PjitFunction(step)"
    ]
    # each call is there twice, one within the other
    outer = [(a, b) for a, b in calls if not any(c < a and b < d for c, d in calls)]
    assert len(outer) == 2

    assert "stablehlo" in (programs / "step.stablehlo.mlir").read_text()
    assert (programs / "step.optimized.hlo").read_text().startswith("HloModule jit_step")

    (first,) = (event for event in read_events(run) if event["event"] == "first step")
    assert first["detail"] in err
    seconds = dict(first["seconds"])
    total, processor = seconds.pop("total"), seconds.pop("processor")
    assert {"imports", "data", "program", "state", "compilation", "first step"} < {*seconds}
    assert sum(seconds.values()) == pytest.approx(total)
    assert all(value >= 0 for value in seconds.values())
    assert processor > 0


@pytest.mark.parametrize("every", [0, 10], ids=["step", "step with statistics"])
def test_a_resumed_run_compiles_while_it_reads(finished: Path, tmp_path: Path, every: int) -> None:
    """Its first step finds the program, and does what it did."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints/12")
    assert main(["resume", str(run), f"--log.statistics-every={every}"]) == 0
    first = [event for event in read_events(run) if event["event"] == "first step"][-1]
    assert first["step"] == 10
    assert not {"tracing", "lowering"} & {*first["seconds"]}
    assert same_bits(state_of(run, 12), state_of(finished, 12))


@pytest.mark.parametrize("text", ["", "0", "5:4", "1:2:3", "x", "-1", "3:", "1.5"])
def test_wrong_steps(text: str, tiny: Tiny, tmp_path: Path, capfd: Any) -> None:
    line = error_of([*run_flags(tiny, tmp_path / "run"), f"--profile={text}"], capfd)
    assert f"--profile: found {text!r}, expected steps such as 20:23, or 20" in line


def test_what_cannot_be_done(tiny: Tiny, finished: Path, tmp_path: Path, capfd: Any) -> None:
    assert step_range("007") == (7, 7)
    flags = run_flags(tiny, tmp_path / "run")
    expected = "error: --profile: found 12:13, expected steps of the run, 1 to 12"
    assert error_of([*flags, "--profile=12:13"], capfd) == expected
    (tmp_path / "file").write_text("")
    line = error_of([*flags, f"--dump-hlo={tmp_path}/file"], capfd)
    assert line == f"error: {tmp_path}/file: File exists"
    remote = error_of([*flags, "--dump-hlo=s3://bucket/x"], capfd)
    assert remote == "error: --dump-hlo: s3://bucket/x is remote, expected a local directory"
    assert not (tmp_path / "run").exists()


def test_a_backend_without_a_profiler(
    tiny: Tiny, finished: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is told in one line, once for each, and the run goes on."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "12")

    def unable(*_: Any) -> None:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(jax.profiler, "start_trace", unable)
    assert error_of(["resume", str(run), "--profile=9:10"], capfd) == (
        "error: --profile: found 9:10, expected steps from 10 on: 9 are done"
    )
    assert main(["resume", str(run), "--profile=10:11"]) == 0
    line = "no profile: the backend cpu cannot make one (no profiler)"
    assert capfd.readouterr().err.count(line) == 1
    assert same_bits(state_of(run, 12), state_of(finished, 12))
