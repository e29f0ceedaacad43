"""What all programs answer alike: --help, --version, and mistakes in their arguments."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable

import pytest

from convert import __main__ as convert
from convert.checkpoint import DTYPES
from convert.formats import registry
from llama_jax.cli.arguments import Parser
from parity_tests.harness.child_process import ROOT

PROGRAMS = ("llama_jax", "train", "convert", "parity_tests", "benchmarks")
# each command, and arguments that lack nothing
COMMANDS: dict[str, list[str]] = {
    "llama_jax generate": ["--model", "M", "--prompt", "P"],
    "llama_jax chat": ["--model", "M"],
    "llama_jax info": ["M"],
    "llama_jax mask": ["--model", "M", "--text", "T"],
    "llama_jax score": ["--model", "M", "--text", "T"],
    "llama_jax quantize": ["--model", "M", "--out", "O"],
    "train run": [],
    "train resume": ["RUN"],
    "train export": ["RUN", "DIR"],
    "train eval": ["RUN"],
    "train report": ["RUN"],
    "train autopsy": ["RUN", "1"],
    "train plan": [],
    "train sweep": [],
    "train coordinates": [],
    "train tokenize": ["SRC", "--tokenizer", "T", "--out", "O"],
    "convert": ["SRC", "DST"],
    "convert info": ["SRC"],
    "convert diff": ["A", "B"],
    "parity_tests report": ["DIR"],
    "parity_tests record": ["DIR", "--out", "O"],
    "parity_tests check": ["TRACE"],
    "parity_tests mutate": [],
    "parity_tests trajectory": ["A", "B"],
    "benchmarks": ["loss"],
}
WRONG_VALUES = {
    "llama_jax generate": ("--top-k", "x", "found 'x', expected an integer"),
    "llama_jax chat": ("--top-p", "x", "found 'x', expected a number"),
    "llama_jax info": ("--seq", "-1", "found '-1', expected a positive integer"),
    "llama_jax mask": ("--padding-side", "x", "found 'x', expected one of left, right"),
    "llama_jax score": ("--batch-size", "0", "found '0', expected a positive integer"),
    "llama_jax quantize": ("--group-size", "1.5", "found '1.5', expected a positive integer"),
    "train run": ("--optimizer.clip-norm", "x", "found 'x', expected a number"),
    "train resume": ("--model.remat", "x", "found 'x', expected one of none, dots, full"),
    "train export": ("--step", "x", "found 'x', expected an integer"),
    "train eval": (
        "--dtype",
        "x",
        "found 'x', expected one of float32, bfloat16, float16, float64",
    ),
    "train plan": ("--mesh.data", "1e3", "found '1e3', expected an integer"),
    "train tokenize": ("--validation-fraction", "x", "found 'x', expected a number"),
    "convert": ("--max-shard-size", "x", "found 'x', expected a size such as 500MB, 5GB or 2GiB"),
    "parity_tests report": ("--dtype", "fp64", "found 'fp64', expected one of fp32, bf16"),
}


# help begins in lower case but for these
NAMES = ("Hugging", "Weights")


def main_of(command: str) -> Callable[[list[str]], int]:
    program, *words = command.split()
    main = importlib.import_module(f"{program}.__main__").main
    return lambda arguments: main([*words, *arguments])


def error_of(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main_of(command)(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .*\n", err)
    return err.removeprefix("error: ").removesuffix("\n")


def helped(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main_of(command)(["--help"])
    assert not end.value.code
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(command, [*COMMANDS[command], "--hellp", "3"], capsys)
    assert error == (
        f"unknown option --hellp (did you mean --help?); see python -m {command} --help"
    )
    error = error_of(command, [*COMMANDS[command], "--qqqqqq=3"], capsys)
    assert error == f"unknown option --qqqqqq; see python -m {command} --help"


@pytest.mark.parametrize(
    "command", [name for name, needed in COMMANDS.items() if needed and name != "llama_jax info"]
)
def test_a_missing_argument(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(command, [], capsys)
    assert re.match(r"(the following arguments are|one of the arguments .* is) required", error)
    assert error.endswith(f"; see python -m {command} --help")


@pytest.mark.parametrize(
    ("command", "option", "value", "expected"),
    [
        ("llama_jax generate", "--seed", str(2**63), "an integer of at most 64 bits"),
        ("train eval", "--batch-size", "0", "a positive integer"),
        ("train eval", "--sequence-length", "0", "a positive integer"),
        ("train eval", "--batches", "-1", "an integer of at least 0"),
    ],
)
def test_numbers_out_of_range(
    command: str, option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(command, [*COMMANDS[command], option, value], capsys)
    assert error.startswith(f"{option}: found {value!r}, expected {expected}; see ")


@pytest.mark.parametrize("command", WRONG_VALUES)
def test_a_wrong_value(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    option, value, message = WRONG_VALUES[command]
    error = error_of(command, [*COMMANDS[command], option, value], capsys)
    assert error == f"{option}: {message}; see python -m {command} --help"
    error = error_of(command, [*COMMANDS[command], option], capsys)
    assert error == f"{option}: expected one argument; see python -m {command} --help"


@pytest.mark.parametrize("program", ["llama_jax", "train", "parity_tests"])
def test_an_unknown_command(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(program, ["nothing"], capsys)
    commands = ", ".join(name.split()[1] for name in COMMANDS if name.startswith(f"{program} "))
    assert error == (
        f"COMMAND: found 'nothing', expected one of {commands}; see python -m {program} --help"
    )


def test_a_misspelled_option_that_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of("llama_jax generate", ["--model", "M", "--promt", "x"], capsys)
    assert error == (
        "unknown option --promt (did you mean --prompt?); see python -m llama_jax generate --help"
    )


def test_an_argument_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of("llama_jax info", ["M", "N"], capsys)
    assert error == "unexpected argument 'N'; see python -m llama_jax info --help"


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        ("llama_jax generate", "--model"),
        ("llama_jax info", "PRESET|DIR"),
        ("train run", "--out"),
        ("train run", "--model.init-from"),
        ("train resume", "RUN"),
        ("train tokenize", "--out"),
        ("convert", "SRC"),
        ("convert", "DST"),
        ("convert", "--average"),
        ("parity_tests report", "HF_DIR"),
    ],
)
def test_an_empty_path(command: str, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = list(COMMANDS[command])
    if argument == "DST":
        arguments[1] = ""
    elif not argument.startswith("--"):
        arguments[0] = ""
    elif argument in arguments:
        arguments[arguments.index(argument) + 1] = ""
    else:
        arguments += [argument, ""]
    error = error_of(command, arguments, capsys)
    assert error == f"{argument}: is empty; see python -m {command} --help"


def test_an_empty_directory_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "=2"):
        assert error_of("train run", ["--data", text], capsys).startswith("data: is empty")


def test_spellings_of_options() -> None:
    parser = Parser()
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--stop", action="append")
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args(
        ["--batch_size=3", "--rate", "-1e-3", "--stop=--a_b", "--stop", "--a b", "--", "--a_b"]
    )
    assert options == argparse.Namespace(
        batch_size=3, rate=-1e-3, stop=["--a_b", "--a b"], rest=["--a_b"]
    )
    with pytest.raises(ValueError, match=r"unknown option --batch \(did you mean --batch-size"):
        parser.parse_args(["--batch", "3"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_version(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main_of(program)(["--version"])
    assert not end.value.code
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(
        rf"llama_jax {re.escape(version)} \(jax [\d.]+, Python [\d.]+\)\n", capsys.readouterr().out
    )


@pytest.mark.parametrize("columns", ["40", "80"])
@pytest.mark.parametrize("command", [*COMMANDS, "llama_jax", "train", "parity_tests"])
def test_help(
    command: str,
    columns: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = helped(command, capsys)
    assert re.match(rf"usage: python -m {command} \[options\]", " ".join(text.split()))
    sections = re.findall(r"^\n(\S.*):$", text, re.MULTILINE)
    allowed = ("positional arguments", "options", "commands", "The format of SRC is detected")
    assert [name for name in sections if name not in allowed and "options" not in name] == []
    usage_and_description = text.split("\n\n")[:2]
    assert re.match(r"[A-Z][^\n]*(\n[^\n]+)*\.$", usage_and_description[1])
    if columns == "80":
        assert max(map(len, text.splitlines())) <= 80


def parsers() -> dict[str, Parser]:
    """The parsers of all programs and commands that make one without running."""
    all_parsers = {}
    for program in ("llama_jax", "train", "convert", "parity_tests"):
        parser = importlib.import_module(f"{program}.__main__")._parser()
        all_parsers |= {program: parser}
        all_parsers |= {f"{program} {name}": command for name, command in parser.commands.items()}
    return all_parsers


@pytest.mark.parametrize(("name", "parser"), parsers().items(), ids=parsers())
def test_every_argument_is_described(name: str, parser: Parser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = [choice.help for choice in action._choices_actions]
        else:
            texts = [action.help]
        for text in texts:
            assert text, action
            first = text.split()[0]
            assert not re.fullmatch("[A-Z][a-z]+", first) or first in NAMES, text
            assert not text.endswith("."), text


def test_the_choices_of_convert_are_those_of_the_formats() -> None:
    choices = {action.dest: action.choices for action in convert._parser()._actions}
    assert choices["to"] == registry.writable()
    assert set(choices["dtype"]) == {*DTYPES, "fp8", "q8_0"}


@pytest.mark.parametrize("command", ["llama_jax", "train", "parity_tests", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys, runpy; program, *sys.argv[1:] = sys.argv[1:]\n"
        "try: runpy.run_module(program, run_name='__main__', alter_sys=True)\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'flax', 'torch', 'transformers', 'rich', 'orbax', 'pyarrow'}\n"
        "sys.exit(str(heavy & {*sys.modules}) if heavy & {*sys.modules} else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
