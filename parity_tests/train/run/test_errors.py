"""Errors around a run: one line, exit code 2, and nothing lost."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.harness.child_process import ROOT
from parity_tests.train.corpus import as_version_1, token_directory
from parity_tests.train.runs import (
    CONFIG,
    Tiny,
    metrics_of,
    run_flags,
    same_bits,
    saved_steps,
    state_of,
)
from train import checkpoints
from train.__main__ import main
from train.checkpoints import FOLDER
from train.data.sources import find_sources
from train.monitoring.metrics_log import read_metrics

pytestmark = [
    # Orbax leaves the other arrays' reads unfinished where one fails
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _collect_garbage() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run: 12 steps, checkpoints of steps 9 and 12."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def error_of(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The error of a command that fails; lines that a run prints before it are allowed."""
    capfd.readouterr()
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert [line for line in lines if "error" in line.lower() or "Traceback" in line] == lines[-1:]
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ")


@pytest.mark.parametrize("name", ["run[final]", "a[!b]/run", "a\\b"])
def test_a_path_that_orbax_cannot_read_from(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    error = error_of(run_flags(tiny, tmp_path / name), capfd)
    assert error.startswith(f"{tmp_path / name}: Orbax cannot save under a path with brackets")
    assert list(tmp_path.iterdir()) == []


# checkpoints ----------------------------------------------------------------------------------------


def largest(folder: Path) -> Path:
    """The file with the arrays."""
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda f: f.stat().st_size
    )


def truncate(checkpoint: Path) -> None:
    file = largest(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete(checkpoint: Path) -> None:
    largest(checkpoint / "params").unlink()


def flip(checkpoint: Path) -> None:
    file = largest(checkpoint / "params")
    content = np.fromfile(file, np.uint8)
    # a single bit might be in a part that is not read: Orbax's file holds more than the arrays
    content[::256] ^= 0x10
    content.tofile(file)


def without_facts(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "facts")


def empty(checkpoint: Path) -> None:
    for file in checkpoint.rglob("*"):
        if file.is_file() and file.name != "commit_success.txt":
            file.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [truncate, delete, flip, without_facts, empty]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_skipped_and_saved_again(
    damage: Callable[[Path], None],
    run: Path,
    finished: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(run / FOLDER / "12")
    assert main(["resume", str(run)]) == 0
    warning = r"warning: .*the checkpoint of step 12 is damaged \(.*falling back"
    assert re.search(warning, capfd.readouterr().err)
    assert saved_steps(run) == [9, 12]
    assert same_bits(state_of(run, 12), state_of(finished, 12))
    assert metrics_of(run) == metrics_of(finished)


def garbled_facts(checkpoint: Path) -> None:
    (checkpoint / "facts" / "metadata").write_bytes(b'{"model": "\x98"}')


def other_facts(checkpoint: Path) -> None:
    (checkpoint / "facts" / "metadata").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [delete, flip, without_facts, empty, garbled_facts, other_facts],
    ids=lambda damage: damage.__name__,
)
def test_evaluation_of_a_damaged_checkpoint(
    damage: Callable[[Path], None], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error names the checkpoint, whatever it was that could not be read."""
    damage(run / FOLDER / "12")
    assert re.fullmatch(
        rf"{run / FOLDER}: the checkpoint of step 12 is damaged \(.+\); choose another with --step",
        error_of(["eval", str(run)], capfd),
    )
    assert main(["eval", str(run), "--step=9"]) == 0


def test_damaged_checkpoints_do_not_displace_intact_ones(
    run: Path, finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps before the damaged one are saved and kept like any others."""
    delete(run / FOLDER / "12")
    assert main(["resume", str(run), "--checkpoint.every=1"]) == 0
    assert "step 12 is damaged" in capfd.readouterr().err
    assert saved_steps(run) == [11, 12]
    assert same_bits(state_of(run, 12), state_of(finished, 12))


def test_all_checkpoints_damaged(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step in (9, 12):
        truncate(run / FOLDER / str(step))
    before = metrics_of(run)
    assert error_of(["resume", str(run)], capfd) == (f"{run / FOLDER}: all checkpoints are damaged")
    assert metrics_of(run) == before
    assert saved_steps(run) == [9, 12]


def test_a_full_disk(run: Path, finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Files may not grow beyond what the small ones need, so writing arrays fails as on a full disk."""
    shutil.rmtree(run / FOLDER / "12")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        message = error_of(["resume", str(run)], capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith("a checkpoint could not be saved (")
    assert message.endswith(
        "); earlier ones are kept: free space and resume, or name a directory on another disk with "
        "--checkpoint.emergency-dir"
    )
    assert saved_steps(run) == [9]
    assert main(["resume", str(run)]) == 0
    assert same_bits(state_of(run, 12), state_of(finished, 12))
    assert metrics_of(run) == metrics_of(finished)


def test_a_full_disk_is_made_room_on(
    tiny: Tiny, finished: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older of two checkpoints goes, and the state is saved again."""
    run, calls = tmp_path / "run", itertools.count(1)
    check = checkpoints.require_no_failed_save

    def fails_once(manager: Any) -> None:
        if next(calls) == 8:
            raise checkpoints.DiskFullError("full")
        check(manager)

    monkeypatch.setattr(checkpoints, "require_no_failed_save", fails_once)
    assert main(run_flags(tiny, run, checkpoint__keep_last=3)) == 0
    warning = f"warning: {run}: the disk is full; removed the checkpoints of steps 3 to save step 8"
    assert capfd.readouterr().err.count(warning) == 1
    assert saved_steps(run) == [8, 9, 12]
    assert same_bits(state_of(run, 12), state_of(finished, 12))
    assert metrics_of(run) == metrics_of(finished)


def test_a_full_disk_with_another_one(
    tiny: Tiny, finished: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other, save = tmp_path / "run", tmp_path / "other", checkpoints.save

    def full(manager: Any, step: int, *state: Any) -> None:
        if step > 6 and run in Path(manager.directory).parents:
            raise checkpoints.DiskFullError("full")
        save(manager, step, *state)

    flags = run_flags(tiny, run, checkpoint__emergency_dir=other)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", full)
        message = error_of(flags, capfd)
    (folder,) = other.iterdir()
    assert message == (
        f"{run}: the disk is full; step 9 was saved in {folder}: free space, then `python -m train resume "
        f"{run}`"
    )
    assert saved_steps(run) == [6]
    assert saved_steps(folder) == [9]
    assert json.loads((run / "heartbeat.json").read_text())["phase"] == "failed"
    assert main(["resume", str(run)]) == 0
    assert "resumed after step 9" in capfd.readouterr().err
    assert saved_steps(run) == [9, 12]
    assert same_bits(state_of(run, 12), state_of(finished, 12))
    assert metrics_of(run) == metrics_of(finished)
    # a new run in the same place has nothing to do with what is saved there
    shutil.rmtree(run)
    assert main([*flags, "--steps=3"]) == 0
    assert list(other.iterdir()) == []


# options that were edited ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 0", "seed = 1", "seed: found 1, expected 0"),
        ("learning_rate = 0.003", "learning_rate = 0.004", "optimizer.learning-rate: found 0.004, exp"),
        ("steps = 12", "steps = 13", "steps: found 13, expected 12: the cosine schedule has already"),
    ],
)  # fmt: skip
def test_options_that_were_edited(run: Path, old: str, new: str, message: str, capfd: Any) -> None:
    file = run / "run.toml"
    text = file.read_text()
    file.write_text(re.sub(f"^{re.escape(old)}$", new, text, flags=re.MULTILINE))
    assert file.read_text() != text
    error = error_of(["resume", str(run)], capfd)
    assert error.startswith(f"{file}: was edited after the run began: {message}")
    assert error.endswith(": change it back, or begin a new run with `python -m train run --toml`")
    file.write_text(text.replace("keep_last = 2", "keep_last = 3"))  # which may change
    assert main(["resume", str(run)]) == 0


def test_a_changed_model_config(
    run: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    assert error_of(["resume", str(run)], capfd) == (
        f"{run / FOLDER}: the checkpoint of step 12 is of another model than config.json: "
        "intermediate_size: found 40, expected 48"
    )
    # another model of the same shapes
    (run / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    assert "rms_norm_eps: found 1e-06, expected 1e-05" in error_of(["resume", str(run)], capfd)
    # no config at all
    (run / "config.json").unlink()
    assert "config.json" in error_of(["resume", str(run)], capfd)


# numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e20, 1e38])
def test_a_loss_that_is_not_finite(
    rate: float, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Warmup starts low, so the first steps are finite, and so are their checkpoints."""
    out = tmp_path / "run"
    flags = run_flags(
        tiny, out, optimizer__learning_rate=rate, checkpoint__every=1, evaluation__every=0
    )
    message = error_of(flags, capfd)
    step = int(message.split(":")[0].removeprefix("step "))
    assert "expected finite numbers: try a lower --optimizer.learning-rate" in message
    assert all(math.isfinite(line["loss"]) for line in read_metrics(out))
    assert all(saved < step for saved in saved_steps(out))
    for saved in saved_steps(out):
        assert all(np.isfinite(leaf).all() for leaf in state_of(out, saved))


# data and options -----------------------------------------------------------------------------------


def test_damaged_data(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = Path(shutil.copytree(tiny.data, tmp_path / "data"))
    shard = data / "train-00001.tokens"
    content = shard.read_bytes()
    flags = run_flags(tiny, tmp_path / "run", data=data)

    shard.write_bytes(content[:-2])
    message = error_of(flags, capfd)
    assert message.startswith(f"{shard}: found {len(content) - 2} bytes, expected {len(content)}")

    shard.unlink()
    assert error_of(flags, capfd).startswith(f"{shard}: no such file")
    assert not (tmp_path / "run").exists()

    shard.write_bytes(b"\xff\xff" * (len(content) // 2))
    message = error_of(flags, capfd)
    assert message.startswith(f"{shard}: found contents with digest ")
    assert not (tmp_path / "run").exists()
    # an index of version 1 has no digests; the error comes from reading
    as_version_1(data)
    message = error_of(flags, capfd)
    assert message.startswith(f"{shard}, token ")
    assert message.endswith("found id 65535, expected less than the model's vocab_size 64")


def test_an_empty_validation_split(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = token_directory(tmp_path / "data", [[[5] * 400]], vocab_size=64)
    shutil.copyfile(tiny.data / "tokenizer.json", data / "tokenizer.json")
    message = error_of(run_flags(tiny, tmp_path / "run", data=data), capfd)
    assert message.startswith(f"{data}: the validation split is empty: run with ")
    assert "--evaluation.every 0, or tokenize with a larger" in message
    assert not (tmp_path / "run").exists()


def test_validation_without_labels(tiny: Tiny, finished: Path, tmp_path: Path, capfd: Any) -> None:
    """One token predicts nothing: its loss is not 0."""
    data = token_directory(tmp_path / "data", [[[5] * 400]], [[[1], [1]]], vocab_size=64)
    shutil.copyfile(tiny.data / "tokenizer.json", data / "tokenizer.json")
    expected = (
        f"{data}: found no token to predict in the batches of its validation split: hold out more "
        "documents, or evaluate more batches or none (--evaluation.every 0)"
    )
    for batches in (0, 2):
        flags = run_flags(tiny, tmp_path / "run", data=data, evaluation__batches=batches)
        assert error_of(flags, capfd) == expected
    assert not (tmp_path / "run").exists()
    assert error_of(["eval", str(finished), "--data", str(data)], capfd) == expected


def test_begin_in_a_folder_with_a_run(run: Path, tiny: Tiny, capfd: Any) -> None:
    before = (run / "run.toml").read_bytes()
    assert error_of(run_flags(tiny, run), capfd) == (
        f"{run}: already contains a run; choose another --out, or resume it with "
        f"`python -m train resume {run}`"
    )
    assert (run / "run.toml").read_bytes() == before
    checkpoints = run / "checkpoints"
    checkpoints.rename(run / "aside")
    assert error_of(run_flags(tiny, run), capfd) == (
        f"{run}: contains a run without a checkpoint; remove it to begin again, or choose another --out"
    )
    (run / "aside").rename(checkpoints)
    # without its run.toml, a new run neither starts from its checkpoints nor overwrites them
    (run / "run.toml").unlink()
    assert error_of(run_flags(tiny, run), capfd) == (
        f"{run}: already contains checkpoints; choose another --out"
    )
    assert saved_steps(run) == [9, 12]


def test_resume_without_the_tokenizer(run: Path, capfd: Any) -> None:
    """Known before any step, rather than at the first evaluation."""
    shutil.rmtree(run / "tokenizer")
    shutil.rmtree(run / FOLDER / "12")
    before = metrics_of(run)
    assert error_of(["resume", str(run)], capfd) == (
        f"{run}/tokenizer: not found, expected the run's tokenizer, which evaluations need: restore it, or "
        "pass --evaluation.every 0"
    )
    assert metrics_of(run) == before
    assert main(["resume", str(run), "--evaluation.every=0"]) == 0


def test_resume_a_folder_without_a_run(tmp_path: Path, capfd: Any) -> None:
    expected = f"{tmp_path}: not the folder of a run: it has no run.toml"
    assert error_of(["resume", str(tmp_path)], capfd) == expected
    missing = f"{tmp_path}/missing"
    expected = f"{missing}: no such directory, expected the folder of a run"
    assert error_of(["resume", missing], capfd) == expected


def test_initial_weights_from_a_file(tiny: Tiny, tmp_path: Path, capfd: Any) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    assert error_of([*run_flags(tiny, tmp_path / "run"), f"--model.init-from={file}"], capfd) == (
        f"model.init-from: {file}: a file; give the directory that it is in"
    )


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--seed=1", "seed: found 1, expected 0"),
        ("--model.preset=tiny-1m", "model.preset: found tiny-1m, expected tiny-4m"),
        ("--data=elsewhere=2", "elsewhere=2',), expected"),  # another weight; a path may change
        ("--steps=13", "steps: found 13, expected 12"),
        ("--batch-size=4", "batch-size: found 4, expected 8"),
        ("--optimizer.beta1=0.8", "optimizer.beta1: found 0.8, expected 0.9"),
        ("--model.parameter-dtype=bfloat16", "found bfloat16, expected float32"),
    ],
)
def test_options_that_cannot_change(flag: str, change: str, finished: Path, capfd: Any) -> None:
    message = error_of(["resume", str(finished), flag], capfd)
    assert message.startswith(f"{finished}: these options cannot change on resume: ")
    assert change in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, "mesh: found data 3 x fsdp 1 x sequence 1 x tensor 1 = 3, expected 1, the "),
        ({"mesh__tensor": 0}, "mesh.tensor: found 0, expected at least 1, or -1 for the remaining devices"),
        ({"mesh__tensor": -1}, "mesh: found -1 for data and tensor, expected it once"),
        ({"steps": 0}, "steps: found 0, expected at least 1"),
        ({"micro_batches": 3}, "micro-batches: found 3, expected a divisor of the batch size 8"),
        ({"sequence_length": 65}, "sequence-length: found 65, expected at most max_position_embeddings=64"),
        ({"optimizer__beta2": 1.5}, "optimizer.beta2: found 1.5, expected at least 0 and below 1"),
        ({"optimizer__learning_rate": "nan"}, "optimizer.learning-rate: found nan, expected a finite"),
        ({"optimizer__clip_norm": 0}, "optimizer.clip-norm: found 0.0, expected a finite number above 0 "),
        ({"optimizer__warmup_steps": 12}, "optimizer.warmup-steps: found 12, expected at most 11"),
        ({"model__compute_dtype": "float16"}, "model.compute-dtype: found float16, expected bfloat16, "),
        ({"model__attention": "triton"}, "attention_implementation='triton': found the platform 'cpu', ex"),
        ({"model__attention": "splash"}, "attention_implementation='splash': found the platform 'cpu', ex"),
        ({"data": "nowhere"}, "nowhere: no such file or directory; make a token directory with"),
        ({"model__config": "nowhere"}, "nowhere"),
        ({"seed": -1}, "seed: found -1, expected 0 to"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options(
    changes: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path, capfd: Any
) -> None:
    assert message in error_of(run_flags(tiny, tmp_path / "run", **changes), capfd)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_is_too_small(tiny: Tiny, tmp_path: Path, capfd: Any) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"vocab_size": 63}))
    message = error_of(run_flags(tiny, tmp_path / "run", model__config=config), capfd)
    assert message == f"{config}: found vocab_size 63, expected at least 64, the data's"


# data by its digest ---------------------------------------------------------------------------------


def other_data(tiny: Tiny, directory: Path) -> Path:
    """Data with the same names, sizes, documents and vocabulary, in which two ids are swapped."""
    data = Path(shutil.copytree(tiny.data, directory))
    shard = data / "train-00000.tokens"
    ids = np.fromfile(shard, "<u2")
    ids[[0, 1]] = ids[[1, 0]]
    ids.tofile(shard)
    return data


def update_digest(data: Path) -> None:
    """Give the index the digest of the changed shard, as if it had been tokenized like this."""
    path = data / "index.json"
    index = json.loads(path.read_text())
    contents = [(data / f"train-00000.{end}").read_bytes() for end in ("tokens", "ends")]
    index["splits"]["train"][0]["sha256"] = hashlib.sha256(b"".join(contents)).hexdigest()
    path.write_text(json.dumps(index))


def test_data_replaced_before_resume(
    tiny: Tiny, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other data at the path of the run's data, with the same names and sizes, is refused."""
    data = other_data(tiny, tmp_path / "data")
    options = (run / "run.toml").read_text()
    (run / "run.toml").write_text(options.replace(str(tiny.data), str(data)))
    shard = data / "train-00000.tokens"
    for arguments in (["resume", str(run)], run_flags(tiny, tmp_path / "new", data=data)):
        message = error_of(arguments, capfd)
        assert message.startswith(f"{shard}: found contents with digest ")
        assert message.endswith("by the index: restore the file, or tokenize again")
    update_digest(data)
    digest = r"found data with digest [0-9a-f]{12}, expected [0-9a-f]{12}, that of "
    for arguments, remedy in (
        (["resume", str(run)], "restore it, or begin a new run"),
        (["eval", str(run), "--batches", "1"], "restore it, or name other data with --data"),
        (
            ["export", str(run), str(tmp_path / "hf"), "--verify"],
            "restore it, or export without --verify",
        ),
    ):
        message = error_of(arguments, capfd)
        assert re.match(re.escape(f"{data}: ") + digest + re.escape(f"{run}: {remedy}"), message)
    assert main(["eval", str(run), "--batches=1", "--data", str(data)]) == 0


def test_data_moved_before_resume(
    tiny: Tiny, run: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The digest shows that it is the same data; other data, or another weight, is refused."""
    shutil.rmtree(run / FOLDER / "12")
    options = (run / "run.toml").read_text()
    (run / "run.toml").write_text(options.replace(str(tiny.data), str(tmp_path / "gone")))
    assert error_of(["resume", str(run)], capfd) == (
        f"{tmp_path / 'gone'}: not found, expected the data of {run}: restore it, or pass the path that it "
        "was moved to with --data"
    )
    moved = str(shutil.copytree(tiny.data, tmp_path / "lang=en"))
    assert f"{run}: these options cannot change on resume: data: found " in error_of(
        ["resume", str(run), "--data", f"{moved}=2", moved], capfd
    )
    other = other_data(tiny, tmp_path / "other")
    update_digest(other)
    assert "found data with digest" in error_of(["resume", str(run), "--data", str(other)], capfd)
    assert main(["resume", str(run), "--data", moved]) == 0
    assert same_bits(state_of(run, 12), state_of(finished, 12))
    assert main(["resume", str(run)]) == 0


def test_a_run_without_recorded_digests_can_be_resumed(
    tiny: Tiny, run: Path, finished: Path, tmp_path: Path
) -> None:
    """Runs and token directories of earlier versions had none."""
    (run / "data.json").unlink()
    shutil.rmtree(run / FOLDER / "12")
    data = as_version_1(Path(shutil.copytree(tiny.data, tmp_path / "data")))
    options = (run / "run.toml").read_text()
    (run / "run.toml").write_text(options.replace(str(tiny.data), str(data)))
    assert main(["resume", str(run)]) == 0
    assert same_bits(state_of(run, 12), state_of(finished, 12))


def test_directories_with_an_equals_sign(tiny: Tiny, tmp_path: Path, capfd: Any) -> None:
    data = Path(shutil.copytree(tiny.data, tmp_path / "lang=en" / "tokens"))
    two = Path(shutil.copytree(tiny.data, tmp_path / "lang=2"))
    assert find_sources([str(data)]) == [(data, 1.0)]
    assert find_sources([f"{data}=3"]) == [(data, 3.0)]
    assert find_sources([str(two), f"{two}=0.5"]) == [(two, 1.0), (two, 0.5)]
    assert find_sources([f"{tiny.data}=1e1"]) == [(tiny.data, 10.0)]
    for weight, expected in (
        ("x", "and 'x' after the = is not a weight: expected PATH or PATH=WEIGHT"),
        ("", "and '' after the = is not a weight: expected PATH or PATH=WEIGHT"),
        ("-1", "data: found weight '-1', expected a positive number"),
        ("nan", "data: found weight 'nan', expected a positive number"),
    ):
        message = error_of(run_flags(tiny, tmp_path / "run", data=f"{tiny.data}={weight}"), capfd)
        assert message.endswith(expected)
    assert not (tmp_path / "run").exists()


# one process, more steps ----------------------------------------------------------------------------


def test_a_running_run_cannot_be_resumed(run: Path, tmp_path: Path, capfd: Any) -> None:
    """The lock ends with its process, however that ends; reading needs no lock."""
    code = (
        "import sys; from pathlib import Path; from train.run.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert error_of(["resume", str(run)], capfd) == (
            f"{run}: process {holder.pid} is running it: wait until it ends, or stop it first"
        )
        assert main(["export", str(run), str(tmp_path / "hf")]) == 0
        holder.kill()
    assert main(["resume", str(run)]) == 0
    assert (
        "all 12 steps are done already; to add more: resume with --steps" in capfd.readouterr().err
    )


@pytest.mark.parametrize("schedule", ["constant", pytest.param("wsd", marks=pytest.mark.slow)])
def test_added_steps_are_as_if_planned_from_the_start(
    schedule: str, tiny: Tiny, tmp_path: Path, capfd: Any
) -> None:
    """Possible with wsd only before its decay begins."""
    changes: dict[str, Any] = {"optimizer__schedule": schedule, "evaluation__every": 0}
    changes |= {"checkpoint__every": 2, "checkpoint__keep_last": 9}
    if schedule == "wsd":
        changes["optimizer__decay_fraction"] = 0.34
    for name, steps in (("run", 6), ("full", 9)):
        assert main(run_flags(tiny, tmp_path / name, steps=steps, **changes)) == 0
    run, full = tmp_path / "run", tmp_path / "full"
    if schedule == "wsd":
        message = error_of(["resume", str(run), "--steps=9"], capfd)
        assert (
            "steps: found 9, expected 6: the wsd schedule has already lowered the learning rate"
            in message
        )
        shutil.rmtree(run / FOLDER / "6")  # back to before the decay
    assert main(["resume", str(run), "--steps=9"]) == 0
    assert "steps = 9" in (run / "run.toml").read_text()
    assert same_bits(state_of(run, 9), state_of(full, 9))
    assert metrics_of(run) == metrics_of(full)
    message = error_of(["resume", str(run), "--steps=5"], capfd)
    assert "steps: found 5, expected 9, or any number from 9, the steps that are done" in message


def test_export_to_a_run_or_without_one(
    run: Path, finished: Path, tmp_path: Path, capfd: Any
) -> None:
    assert error_of(["export", str(run), str(run)], capfd) == (
        f"{run}: contains a run; choose another directory to export to"
    )
    for command in (["export", str(tmp_path), str(tmp_path / "hf")], ["resume", str(tmp_path)]):
        expected = f"{tmp_path}: not the folder of a run: it has no run.toml"
        assert error_of(command, capfd) == expected
    (tmp_path / "file").write_text("")
    assert error_of(["export", str(run), str(tmp_path / "file")], capfd) == (
        f"{tmp_path}/file: is a file; choose another directory to export to"
    )


def test_data_without_its_tokenizer(tiny: Tiny, tmp_path: Path, capfd: Any) -> None:
    data = Path(shutil.copytree(tiny.data, tmp_path / "data"))
    (data / "tokenizer.json").unlink()
    assert error_of(run_flags(tiny, tmp_path / "run", data=data), capfd) == (
        f"{data}/tokenizer.json: not found, expected the tokenizer of the data"
    )
    assert not (tmp_path / "run").exists()
