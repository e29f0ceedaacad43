"""Options as flags: every kind of field, what the help shows, and values of a file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from llama_jax.cli.arguments import Parser
from train.flags import add_options, parse_options, with_options


@dataclass(frozen=True)
class Inner:
    """What is inside."""

    on: bool = False
    """switch it on"""
    level: Literal["low", "high"] | None = None
    """a level; default: low"""
    colors: tuple[Literal["red", "blue"], ...] = ()
    """colors: red, blue"""


@dataclass(frozen=True)
class Outer:
    """What is outside."""

    out_path: Path = Path("a")
    """where to"""
    names: tuple[str, ...] = ("x", "y")
    """names, 100% of them"""
    rate: float | None = 0.5
    """a
    rate"""
    text: str = " "
    """a text"""
    count: int = 3
    """a count"""
    inner: Inner = field(default_factory=Inner)


def parsed(*words: str) -> Outer:
    parser = Parser()
    add_options(parser, Outer())
    return with_options(Outer(), parser.parse_args(words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Outer()),
        (["--out-path", "b/c"], Outer(out_path=Path("b/c"))),
        (["--out_path=b"], Outer(out_path=Path("b"))),
        (["--names"], Outer(names=())),
        (["--names", "z", "--count", "-4"], Outer(names=("z",), count=-4)),
        (["--rate", "None", "--text="], Outer(rate=None, text="")),
        (["--rate", "-1e-3"], Outer(rate=-1e-3)),
        (["--text", "None"], Outer(text="None")),
        (["--inner.on"], Outer(inner=Inner(on=True))),
        (["--inner.on", "--inner.no-on"], Outer()),
        (["--inner.level", "high"], Outer(inner=Inner(level="high"))),
        (["--inner.level", "high", "--inner.level", "None"], Outer()),
        (["--inner.colors", "red", "blue"], Outer(inner=Inner(colors=("red", "blue")))),
        (["--inner.colors", "red,blue"], Outer(inner=Inner(colors=("red", "blue")))),
        (["--inner.colors=blue"], Outer(inner=Inner(colors=("blue",)))),
        (["--inner.colors"], Outer()),
    ],
)
def test_values(words: list[str], expected: Outer) -> None:
    assert parsed(*words) == expected


def test_only_what_is_given_overrides() -> None:
    parser = Parser()
    add_options(parser, Outer())
    base = Outer(count=7, inner=Inner(on=True, level="high"))
    changed = with_options(base, parser.parse_args(["--inner.level", "low"]))
    assert changed == Outer(count=7, inner=Inner(on=True, level="low"))


def help_of(*, show_defaults: bool) -> str:
    parser = Parser(prog="x")
    add_options(parser, Outer(), show_defaults=show_defaults)
    return parser.format_help()


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, _, options = help_of(show_defaults=True).partition("exit\n")
    assert (
        options
        == """\
  --out-path PATH       where to (default: a)
  --names [TEXT ...]    names, 100% of them (default: x y)
  --rate X              a rate (default: 0.5)
  --text TEXT           a text (default: ' ')
  --count N             a count (default: 3)

inner options:
  What is inside.

  --inner.on, --inner.no-on
                        switch it on
  --inner.level {low,high}
                        a level; default: low
  --inner.colors [NAME ...]
                        colors: red, blue
"""
    )
    assert "(default" not in help_of(show_defaults=False)


def test_an_error_in_a_file_names_it() -> None:
    with pytest.raises(ValueError) as caught:
        parse_options(Outer(), ["--count", "x"], Path("a/run.toml"))
    assert str(caught.value) == "a/run.toml: --count: found 'x', expected an integer"
    with pytest.raises(
        ValueError, match=r"inner\.level: found 'x', expected one of None, low, high"
    ):
        parse_options(Outer(), ["--inner.level=x"], Path("a"))
    with pytest.raises(ValueError) as caught:
        parse_options(Outer(), ["--inner.colors", "red,green"], Path("a"))
    assert str(caught.value) == "a: --inner.colors: found 'green', expected some of red, blue"


def test_the_namespace_has_only_what_is_given() -> None:
    parser = Parser()
    add_options(parser, Outer())
    assert parser.parse_args([]) == argparse.Namespace()
