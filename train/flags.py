"""Dataclasses of options as command-line options.

Every field of a dataclass is an option, and a field that is a dataclass a group of options with a prefix:
`RunOptions.model.remat` is `--model.remat`. The docstring below a field is its help.
"""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from llama_jax.cli.arguments import Parser, integer, number

Options = TypeVar("Options")

_CHECKED: dict[Any, Callable[[str], Any]] = {int: integer, float: number}
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def add_options(
    parser: argparse.ArgumentParser, defaults: Any, *, show_defaults: bool = True
) -> None:
    """Add an option for every field of the dataclass `defaults`, and show its values in the help.

    The parsed namespace has only the options of the command line; `with_options` puts them in a dataclass.
    """
    _add_options(parser, parser, defaults, prefix="", show_defaults=show_defaults)


def with_options(options: Options, parsed: argparse.Namespace) -> Options:
    """`options` with what a parser of `add_options` has parsed in place of its own values.

    >>> from train.options import RunOptions
    >>> parser = Parser()
    >>> add_options(parser, RunOptions())
    >>> options = with_options(RunOptions(), parser.parse_args(["--steps", "7", "--model.remat", "full"]))
    >>> (options.steps, options.model.remat, options.batch_size)
    (7, 'full', 8)
    """
    return _with_options(options, vars(parsed), prefix="")


def parse_options(defaults: Options, flags: Sequence[str], source: Path) -> Options:
    """`defaults` with the values that `flags`, made from the file `source`, have instead.

    Raises:
        ValueError: an option with a wrong value, or an unknown one; the message begins with `source`.
    """
    parser = _FileParser(prog=str(source))
    add_options(parser, defaults)
    return with_options(defaults, parser.parse_args(flags))


class _FileParser(Parser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{self.prog}: {message.removeprefix('argument ')}")


class OnOff(argparse.Action):
    """`--group.name` and `--group.no-name`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        group, dot, name = option_strings[0].removeprefix("--").rpartition(".")
        both = [option_strings[0], f"--{group}{dot}no-{name}"]
        super().__init__(both, dest, nargs=0, **options)

    def __call__(  # noqa: D102
        self, parser: object, namespace: object, values: object, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, option == self.option_strings[0])


class Names(argparse.Action):
    """Names out of `known`, separated by spaces or commas."""

    def __init__(self, *arguments: Any, known: Sequence[str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.known = known

    def __call__(  # noqa: D102
        self, parser: object, namespace: object, values: Any, option: str | None = None
    ) -> None:
        names = [name for value in values for name in value.split(",") if name]
        for name in names:
            if name not in self.known:
                expected = f"expected some of {', '.join(self.known)}"
                raise argparse.ArgumentError(self, f"found {name!r}, {expected}")
        setattr(namespace, self.dest, names)


def _add_options(
    parser: argparse.ArgumentParser, group: Any, values: Any, prefix: str, show_defaults: bool
) -> None:
    hints, helps = get_type_hints(type(values)), _docstrings(type(values))
    for field in fields(values):
        value, name = getattr(values, field.name), prefix + field.name
        if is_dataclass(value):
            title = f"{name.replace('_', '-')} options"
            nested = parser.add_argument_group(title, inspect.getdoc(type(value)))
            _add_options(parser, nested, value, f"{name}.", show_defaults)
            continue
        text = helps.get(field.name, "")
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            help=_help(text, value) if show_defaults else text.replace("%", "%%"),
            **_kind(hints[field.name]),
        )


def _help(text: str, default: Any) -> str:
    if "default" not in text and default not in (None, False, ()):
        shown = " ".join(default) if isinstance(default, tuple) else str(default)
        text += f" (default: {shown!r})" if shown != shown.strip() else f" (default: {shown})"
    return text.replace("%", "%%")


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    if hint is bool:
        return {"action": OnOff}
    if get_origin(hint) is tuple:
        (element, _) = get_args(hint)
        if get_origin(element) is Literal:
            return {"nargs": "*", "action": Names, "known": get_args(element), "metavar": "NAME"}
        return {"nargs": "*", "type": element, "metavar": _METAVARS[element]}
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    optional = NoneType in get_args(hint)
    kind = kinds[0] if optional else hint
    if get_origin(kind) is Literal:
        names = get_args(kind)
        choices = (None, *names) if optional else names
        parse = _or_none(str) if optional else str
        return {"type": parse, "choices": choices, "metavar": f"{{{','.join(names)}}}"}
    return {"type": _or_none(kind) if optional else kind, "metavar": _METAVARS[kind]}


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """`kind`, or None for the text "None"."""
    parse = _CHECKED.get(kind, kind)
    return lambda text: None if text == "None" else parse(text)


def _with_options(options: Any, parsed: dict[str, Any], prefix: str) -> Any:
    changes = {}
    for field in fields(options):
        value, name = getattr(options, field.name), prefix + field.name
        if is_dataclass(value):
            changes[field.name] = _with_options(value, parsed, f"{name}.")
        elif name in parsed:
            changes[field.name] = tuple(parsed[name]) if isinstance(value, tuple) else parsed[name]
    return replace(options, **changes)


@cache
def _module(name: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[name]))


def _docstrings(dataclass: type) -> dict[str, str]:
    """The string below each field, which Python itself drops."""
    (definition,) = (
        node
        for node in _module(dataclass.__module__).body
        if isinstance(node, ast.ClassDef) and node.name == dataclass.__name__
    )
    texts = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            texts[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return texts


def step_range(text: str) -> tuple[int, int]:
    """First and last step of "20:23" or "20".

    >>> step_range("20:23"), step_range("20")
    ((20, 23), (20, 20))
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected steps such as 20:23, or 20")
    return first, last
