"""Runs on token files of other programs: the same run as on a token directory, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from parity_tests.train.corpus import documents_of, word_tokenizer
from parity_tests.train.data.formats.writers import bare, flat, megatron
from parity_tests.train.runs import VOCAB, Tiny, metrics_of, run_flags, same_bits, state_of
from train.__main__ import main
from train.checkpoints import FOLDER
from train.data.token_shards import open_tokens


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = ["<s>", "<|endoftext|>", "<unk>", *(f"w{n}" for n in range(VOCAB - 3))]
    return word_tokenizer(tmp_path / "tokenizer", words)


def write_files(kind: str, tiny: Tiny, directory: Path) -> Path:
    directory.mkdir()
    for split in ("train", "validation"):
        documents = documents_of(open_tokens(tiny.data, split))
        if kind == "megatron":
            megatron(directory / f"text_{split}_document", documents)
        else:
            bare(directory / f"{split}.bin", flat(documents))
    return directory


@pytest.mark.parametrize("kind", ["bare", pytest.param("megatron", marks=pytest.mark.slow)])
def test_a_run_in_place_resumed(
    kind: str, tiny: Tiny, tokenizer: Path, tmp_path: Path, capfd: Any
) -> None:
    """Like a run on the token directory, of the same process."""
    data, run, finished = (
        write_files(kind, tiny, tmp_path / "data"),
        tmp_path / "run",
        tmp_path / "a",
    )
    assert main(run_flags(tiny, finished)) == 0
    files = {path: path.stat().st_mtime_ns for path in data.iterdir()}
    assert main(run_flags(tiny, run, data=data, tokens__tokenizer=tokenizer)) == 0
    assert same_bits(state_of(run, 12), state_of(finished, 12))
    assert metrics_of(run) == metrics_of(finished)
    shutil.rmtree(tokenizer)  # the run has a copy
    shutil.rmtree(run / FOLDER / "12")
    assert main(["resume", str(run)]) == 0
    assert same_bits(state_of(run, 12), state_of(finished, 12))
    assert {path: path.stat().st_mtime_ns for path in data.iterdir()} == files
    capfd.readouterr()
    assert main(["eval", str(finished)]) == 0
    expected = capfd.readouterr().out
    for arguments in ([], ["--data", str(data)]):
        assert main(["eval", str(run), *arguments]) == 0
        assert capfd.readouterr().out == expected
    assert main(["export", str(run), str(tmp_path / "hf"), "--with-optimizer"]) == 2
    assert "is not a token directory, which --with-optimizer needs" in capfd.readouterr().err
    other = next(data.glob("*train*.bin"))
    content = bytearray(other.read_bytes())
    content[0] ^= 1
    other.write_bytes(content)
    assert main(["resume", str(run)]) == 2
    assert f"error: {data}: found data with digest " in capfd.readouterr().err


@pytest.mark.slow
def test_mixed_with_a_token_directory(tiny: Tiny, tokenizer: Path, tmp_path: Path) -> None:
    """A mixture of sources of several formats is that of their token directories."""
    data = write_files("megatron", tiny, tmp_path / "data")
    flags = {"steps": 3, "evaluation__every": 3, "tokens__tokenizer": tokenizer}
    metrics = []
    for name, mixture in (
        ("a", [tiny.data, f"{data}=0.5"]),
        ("b", [tiny.data, f"{tiny.data}=0.5"]),
    ):
        arguments = run_flags(tiny, tmp_path / name, **flags)
        arguments += ["--data", *map(str, mixture)]
        assert main(arguments) == 0
        metrics.append(metrics_of(tmp_path / name))
    assert metrics[0] == metrics[1]


def test_what_is_refused(tiny: Tiny, tokenizer: Path, tmp_path: Path, capfd: Any) -> None:
    path = bare(tmp_path / "a.bin", [3, 4, 1, 5, 1])

    def error_of(**changes: Any) -> str:
        assert main(run_flags(tiny, tmp_path / "run", data=path, **changes)) == 2
        assert not (tmp_path / "run").exists()
        (line,) = capfd.readouterr().err.splitlines()
        return line

    assert error_of() == (
        f"error: {path}: token files have no tokenizer with them: name theirs with --tokens.tokenizer"
    )
    assert error_of(tokens__tokenizer=tokenizer) == (
        f"error: {path}: has no files for validation: hold documents out with "
        "--tokens.validation-fraction, or run with --evaluation.every 0"
    )
    for fraction in (-0.1, 1, "nan"):
        line = error_of(tokens__tokenizer=tokenizer, tokens__validation_fraction=fraction)
        assert line.endswith("expected at least 0 and below 1")
    bare(path, [3, 4, 1, 64, 1])
    line = error_of(tokens__tokenizer=tokenizer, tokens__validation_fraction=0.5)
    assert line == (
        f"error: {path}, token 3: found id 64, expected less than the tokenizer's vocabulary of 64; if its "
        "ids are not uint16, name their dtype with --tokens.dtype"
    )
