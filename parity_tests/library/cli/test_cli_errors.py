"""`run_program`: what each way to end a program prints, and its exit code."""

from __future__ import annotations

import errno
import gc
import importlib
import io
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer, models

from llama_jax import formatting
from llama_jax.__main__ import main
from llama_jax.cli import program
from llama_jax.cli.program import one_line, run_program
from llama_jax.text.tokenizers_errors import tokenizers_errors


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


BACKEND = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("x: found 1, expected 2"), "x: found 1, expected 2"),
        (ValueError(""), "ValueError"),
        (ValueError("a\nb\r\x1b[31mc\u2028\udcff"), r"a\nb\r\x1b[31mc\u2028\udcff"),
        (ValueError("日本 é 👩‍👧 [/b] :smile:"), "日本 é 👩‍👧 [/b] :smile:"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), "a: b: Invalid link"),
        (FileExistsError("/a: exists"), "/a: exists"),
        (FileNotFoundError(2, "No such file or directory", b"a\xff\n"), None),
        (MemoryError(), "not enough memory"),
        (MemoryError("Unable to allocate 7 TiB"), "not enough memory: Unable to allocate 7 TiB"),
        (OverflowError("int too large"), "a size is out of range: int too large"),
        (RecursionError("maximum"), "nested too deeply: maximum"),
        (DeprecationWarning("old"), "DeprecationWarning: old"),
        (
            BACKEND("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            "not enough memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.",
        ),
        (
            BACKEND("INTERNAL: Failed to allocate: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
            "not enough memory: INTERNAL: Failed to allocate: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        ),
        (
            BACKEND("UNIMPLEMENTED: DotThunk BF16 x BF16 = F32\nat x"),
            "the backend failed: UNIMPLEMENTED: DotThunk BF16 x BF16 = F32",
        ),
        (BACKEND("INVALID_ARGUMENT: x"), "the backend failed: INVALID_ARGUMENT: x"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line_and_2(
    error: Exception, line: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    line = r"a\udcff\n: No such file or directory" if line is None else line
    assert one_line(error) == line
    assert run_program(raising(error)) == 2
    assert capfd.readouterr() == ("", f"error: {line}\n")


def test_a_long_error_keeps_both_ends() -> None:
    line = one_line(ValueError("found " + "x" * 10**6 + ", expected y"))
    assert len(line) < 2100
    assert line.startswith("found xxx")
    assert line.endswith("xxx, expected y")


def test_a_mistake_of_ours_is_a_traceback() -> None:
    for error in (TypeError("x"), AssertionError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            run_program(raising(error))


def test_an_extra_that_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert run_program(raising(error), extra="parity") == 2
    assert "torch is not installed; in the checkout: pip install '.[parity]'" in (
        capfd.readouterr().err
    )
    with pytest.raises(ModuleNotFoundError):
        run_program(raising(error))


def test_what_tokenizers_raises_is_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, [], unk_token="[UNK]"))
    assert run_program(lambda: tokenizer.encode("b") and None) == 2
    assert capfd.readouterr().err == "error: Unk token `[UNK]` not found in the vocabulary\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt_and_their_handlers_come_back(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    ended = []

    def command() -> None:
        try:
            signal.raise_signal(number)
        finally:
            ended.append(True)  # what was begun is cleaned up

    try:
        assert run_program(command, interrupted="interrupted: nothing was written") == 130
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended == [True]
    assert capfd.readouterr() == ("", "interrupted: nothing was written\n")


def test_an_interrupt_that_a_destructor_swallows_comes_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Loud:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    with warnings.catch_warnings():  # of what other tests left
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()

    def command() -> None:
        Loud()
        gc.collect()
        time.sleep(5)
        raise AssertionError("nobody heard")

    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert run_program(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "interrupted\n"


def test_warnings_are_lines_whatever_python_was_told(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        warnings.warn("a\nb [/b]", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_program(command) == 0
    assert capfd.readouterr().err == "warning: a\\nb [/b]\n"


def test_help_ends_with_0(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert not end.value.code
    assert "usage" in capfd.readouterr().out


def test_a_panic_of_rust_is_a_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    content = {"version": "1.0", "added_tokens": []}
    content |= {"model": model | {"continuing_subword_prefix": "longer"}}
    with pytest.raises(ValueError, match="out of range"), tokenizers_errors():
        Tokenizer.from_str(json.dumps(content))
    assert capfd.readouterr().err == ""
    assert run_program(lambda: Tokenizer.from_str(json.dumps(content)) and None) == 2
    assert "out of range" in capfd.readouterr().err.splitlines()[-1]


# what is shown --------------------------------------------------------------------------------------

HOSTILE = "run[final] [/b] [bold]x[/bold] :smile: [link=x] \x1b[31m"
SHOWN = r"run[final] [/b] [bold]x[/bold] :smile: [link=x] \x1b[31m"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, io.StringIO]:
    file = io.StringIO()
    return formatting.console(file=file, width=100, force_terminal=True, color_system=None), file


def test_text_is_shown_as_it_is(terminal: tuple[Any, io.StringIO]) -> None:
    console, file = terminal
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE)
    console.print(HOSTILE, style="bold", soft_wrap=True)
    console.print(table)
    assert file.getvalue().count(SHOWN) == 6
    assert "\x1b[31m" not in file.getvalue()


def test_info_shows_the_directory(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    directory = tmp_path / HOSTILE.replace("/", "")
    directory.mkdir()
    fields = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 4}
    fields |= {"intermediate_size": 8, "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(fields))
    assert main(["info", str(directory)]) == 0
    assert f"{tmp_path}/{SHOWN.replace('/', '')}: configuration" in capsys.readouterr().out
    assert main(["info", str(directory / "[x] :smile:\n")]) == 2
    assert f"error: {tmp_path}/{SHOWN.replace('/', '')}/[x] :smile:\\n: neither" in (
        capsys.readouterr().err
    )


def test_a_closed_pipe_under_a_redrawing_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:

        def command() -> None:
            console = formatting.console(file=broken, force_terminal=True)
            with Progress(console=console, refresh_per_second=100) as progress:
                progress.add_task("x", total=10)
                time.sleep(0.1)
                progress.console.print("y")

        assert run_program(command) == 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), broken.fileno())  # what is left in its buffer


@pytest.mark.parametrize(("encoding", "text"), [("ascii", '"w\\u00e9"'), ("utf-8", '"wé"')])
def test_json_in_the_encoding_of_stdout(
    encoding: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert program.json_line("wé") == text


def test_an_interrupt_during_an_import_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Extension modules crash when an exception stops their initialization."""
    (tmp_path / "slow_to_import.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # a suite that runs in the background may have been started with the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def command() -> None:
        importlib.import_module("slow_to_import")
        time.sleep(5)
        raise AssertionError("the signal was lost")

    try:
        assert run_program(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "slow_to_import" in sys.modules
    assert capfd.readouterr().err == "interrupted\n"
