"""Runs whose folder is remote: the same numbers, resumed, exported; and what is refused."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import fsspec
import pytest

from llama_jax.files.paths import marker_of
from llama_jax.files.remote import file_system, name_in, remote_path
from llama_jax.files.upload import write_bytes
from llama_jax.load import load_model
from parity_tests.harness.object_store import memory_folder, serve_s3
from parity_tests.train.runs import (
    Tiny,
    environment,
    finish,
    metrics_of,
    run_flags,
    same_bits,
    saved_steps,
    start,
    state_of,
)
from train.__main__ import main
from train.run import remote
from train.run.remote import local_run

STEPS = {"steps": 12, "optimizer__schedule": "constant"}


@pytest.fixture(scope="module")
def full_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in a local folder, without interruption."""
    out = tmp_path_factory.mktemp("full") / "run"
    assert main(run_flags(tiny, out, **STEPS)) == 0
    return out


@pytest.fixture(scope="module")
def resumed_run(tiny: Tiny, full_run: Path) -> str:
    """The run in a remote folder, six steps, and then the other six."""
    url = memory_folder() + "/run"
    assert main(run_flags(tiny, url, **STEPS | {"steps": 6})) == 0
    assert main(["resume", url, "--steps=12"]) == 0
    return url


def names(url: str) -> set[str]:
    path = remote_path(url)
    store = file_system(path)
    store.invalidate_cache()
    return {name.removeprefix(name_in(path) + "/") for name in store.find(name_in(path))}


def steps_of(url: str) -> list[int]:
    parts = [name.split("/") for name in names(url) if name.startswith("checkpoints/")]
    return sorted({int(part[1]) for part in parts if part[1].isdecimal()})


def test_a_resumed_run_ends_like_an_uninterrupted_one(full_run: Path, resumed_run: str) -> None:
    with local_run(remote_path(resumed_run)) as copy:
        assert saved_steps(copy) == [12]
        assert same_bits(state_of(copy, 12), state_of(full_run, 12))
        steps = [line["step"] for line in metrics_of(copy) if "loss" in line]
        assert steps == list(range(1, 13))
        expected = {line["step"]: line["loss"] for line in metrics_of(full_run) if "loss" in line}
        assert {x["step"]: x["loss"] for x in metrics_of(copy) if "loss" in x} == expected
    assert steps_of(resumed_run) == saved_steps(full_run)
    local = {
        path.relative_to(full_run).as_posix()
        for path in full_run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert {name for name in names(resumed_run) if not name.startswith("checkpoints/")} == {
        name for name in local if not name.startswith("checkpoints/")
    }


def test_a_run_is_exported_evaluated_and_loaded(
    full_run: Path, resumed_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = memory_folder() + "/export"
    assert main(["export", resumed_run, out]) == 0
    assert f"written: {out}, step 12" in capsys.readouterr().err
    assert main(["export", str(full_run), str(tmp_path / "export")]) == 0
    stored = file_system(remote_path(out)).cat_file(
        name_in(remote_path(out)) + "/model.safetensors"
    )
    assert stored == (tmp_path / "export/model.safetensors").read_bytes()
    assert names(out) == {path.name for path in (tmp_path / "export").iterdir()}
    assert main(["export", resumed_run, out]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", resumed_run, str(tmp_path / "at 9"), "--step=9"]) == 0
    losses = []
    for run in (resumed_run, str(full_run)):
        capsys.readouterr()
        assert main(["eval", run]) == 0
        losses.append(capsys.readouterr().out)
    assert losses[0] == losses[1]
    assert load_model(resumed_run).config.vocab_size == 64


def test_file_urls_are_local(
    tiny: Tiny, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}"
    assert main(run_flags(tiny, f"{url}/run", **STEPS | {"steps": 6})) == 0
    assert main(["resume", f"{url}/run", "--steps=12"]) == 0
    assert same_bits(state_of(tmp_path / "run", 12), state_of(full_run, 12))
    assert main(["eval", f"{url}/run"]) == 0
    assert main(["report", f"{url}/run"]) == 0
    assert main(["export", f"{url}/run", f"{url}/export"]) == 0
    text = tmp_path / "text.txt"
    text.write_text("w3 w4 w5")
    tokens = ["--tokenizer", str(tiny.data), "--out", f"{url}/tokens", "--validation-fraction=0"]
    assert main(["tokenize", str(text), *tokens]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "export", "text.txt", "tokens"}


def test_mistakes_are_one_line(
    tiny: Tiny, resumed_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, text = memory_folder() + "/run", tmp_path / "a.txt"
    text.write_text("text")
    for arguments, problem in (
        (run_flags(tiny, resumed_run), "is not empty; choose another --out, or resume"),
        (run_flags(tiny, new, distributed__enabled="true"), "mount the bucket"),
        (run_flags(tiny, new, data="memory://tokens"), "data: memory://tokens is remote"),
        (run_flags(tiny, new, data="/nowhere"), "/nowhere"),
        (["resume", new], "has no run.toml"),
        (["export", new, str(tmp_path / "x")], "has no run.toml"),
        (
            ["export", resumed_run, str(tmp_path / "x"), "--step=5"],
            "step: found 5, expected one of",
        ),
        (["tokenize", "s3://b/*.txt", "--tokenizer=x", "--out=y"], "copy it to this machine"),
        (["tokenize", str(text), f"--tokenizer={tiny.data}", "--out=s3://b/y"], "copy it to"),
    ):
        arguments = [a.replace("enabled=true", "enabled") for a in arguments]
        assert main(arguments) == 2, arguments
        err = capsys.readouterr().err
        assert problem in err
        assert err.count("error: ") == 1
        assert err.strip().count("\n") == 0, err
    assert names(new) == set()


def test_a_checkpoint_that_was_cut_is_passed_over(full_run: Path) -> None:
    url = memory_folder() + "/run"
    for file in full_run.rglob("*"):
        if file.is_file():
            write_bytes(remote_path(url) / file.relative_to(full_run).as_posix(), file.read_bytes())
    write_bytes(remote_path(url) / "checkpoints/.12.partial", b"")
    with local_run(remote_path(url)) as copy:
        assert saved_steps(copy) == [9]


def test_of_two_processes_the_later_one_has_the_run(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = memory_folder() + "/run"
    changed = remote._Mirror._changed

    def taken_over(self) -> dict[str, tuple[int, int]]:
        write_bytes(self._url / ".running", b"another")
        return changed(self)

    monkeypatch.setattr(remote._Mirror, "_changed", taken_over)
    assert main(run_flags(tiny, url, **STEPS)) == 2
    assert "another process has taken over this run" in capsys.readouterr().err
    assert names(url) == {".running"}


@pytest.mark.slow
def test_killed_on_an_object_store(tiny: Tiny, tmp_path: Path) -> None:
    options = STEPS | {"steps": 6000, "checkpoint__every": 300, "evaluation__every": 2000}
    finish(start(run_flags(tiny, tmp_path / "full", **options), environment(tiny.cache)))
    with serve_s3() as bucket:
        url, _store = f"{bucket}/run", fsspec.filesystem("s3")
        process = start(run_flags(tiny, url, **options), environment(tiny.cache))
        while process.poll() is None:
            if remote._complete_steps(list(names(url))):
                process.kill()
            time.sleep(0.01)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert 6000 not in steps_of(url)
        err = finish(start(["resume", url], environment(tiny.cache)))
        assert "resumed after step" in err
        with local_run(remote_path(url)) as copy:
            assert saved_steps(copy) == [6000]
            assert same_bits(state_of(copy, 6000), state_of(tmp_path / "full", 6000))
            assert metrics_of(copy) == metrics_of(tmp_path / "full")


def test_an_export_that_is_made_again_replaces_the_earlier_one(tiny: Tiny) -> None:
    url = memory_folder() + "/run"
    options = STEPS | {"steps": 6, "checkpoint__every": 3, "export_every": 3}
    assert main(run_flags(tiny, url, **options)) == 0
    export = remote_path(url) / "exports/6"
    file = export / "model.safetensors"
    expected = file.read_bytes()
    # as if the upload had ended after the export, before the checkpoint of the same step
    write_bytes(remote_path(url) / "checkpoints/.6.partial", b"")
    write_bytes(file, b"of an earlier attempt")
    assert main(["resume", url]) == 0
    assert steps_of(url) == [3, 6]
    assert file.read_bytes() == expected
    assert not marker_of(export).exists()
