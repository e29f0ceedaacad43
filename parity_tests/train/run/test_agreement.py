"""A checkpoint that one of several processes cannot read is passed over by all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from parity_tests.train.runs import (
    Tiny,
    environment,
    finish,
    joined_flags,
    metrics_of,
    run_flags,
    same_bits,
    saved_steps,
    start,
    state_of,
)
from train import agreement
from train.agreement import DamagedError, together
from train.checkpoints import FOLDER


def failing() -> int:
    raise OSError("no such\nfile")


def test_one_process_alone() -> None:
    assert together(lambda: 3) == 3
    with pytest.raises(DamagedError, match=r"^no such$"):
        together(failing)
    with pytest.raises(OSError):
        together(failing, OSError)


def test_another_process_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "gathered", lambda text: ["", text, "checksum"])
    with pytest.raises(DamagedError, match=r"^in process 2: checksum$"):
        together(lambda: 3)
    with pytest.raises(DamagedError, match=r"^no such$"):
        together(failing)


def in_two_processes(tiny: Tiny, arguments: list[str]) -> list[str]:
    """The stderr of each, which must end with 0."""
    env = environment(tiny.cache)
    processes = [start([*arguments, *joined], env) for joined in joined_flags(2)]
    try:
        return [finish(process, out=None) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_damage_that_one_process_sees(tiny: Tiny, tmp_path: Path) -> None:
    """Of a checkpoint of two processes, the second alone reads the file that it wrote."""
    full, run = tmp_path / "full", tmp_path / "run"
    in_two_processes(tiny, run_flags(tiny, full, mesh__data=1, mesh__fsdp=2))
    shutil.copytree(full, run)
    (run / "run.toml").write_text((full / "run.toml").read_text().replace(str(full), str(run)))
    own = run / FOLDER / "12" / "params" / "ocdbt.process_1"
    shutil.rmtree(own)
    for process, err in enumerate(in_two_processes(tiny, ["resume", str(run)])):
        who = "" if process == 1 else "in process 1: "
        assert re.search(rf"step 12 is damaged \({who}.*\); falling back to the previous", err)
    assert saved_steps(run) == [9, 12]
    assert same_bits(state_of(run, 12), state_of(full, 12))
    assert metrics_of(run) == metrics_of(full)
