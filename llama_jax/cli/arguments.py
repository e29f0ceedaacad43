"""The argument parser that the command-line programs share, and types of arguments."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from llama_jax.formatting import size


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a ValueError of one line, and whose usage fits on one.

    Options are written in full, with dashes or underscores: `--batch-size` or `--batch_size`.
    """

    def __init__(self, **options: Any) -> None:
        style: dict[str, Any] = {"formatter_class": _HelpFormatter, "allow_abbrev": False}
        super().__init__(**style | options)
        self.register("type", int, integer)
        self.register("type", float, number)
        # argparse's own pattern lacks exponents, and would take -1e-3 for an option
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self.commands: dict[str, Parser] = {}
        self._adder: Any = None

    def add_command(
        self, name: str, run: Callable[..., Any], *, help: str, description: str | None = None
    ) -> Parser:
        """Add a command, and return its parser.

        Args:
            name: what the user types.
            run: called with the parsed options, in which it is `command`.
            help: one line for the list of commands: lower case, no period.
            description: the beginning of the command's own help; default: `help` as a sentence.
        """
        if self._adder is None:
            self._adder = self.add_subparsers(
                title="commands", required=True, metavar="COMMAND", prog=self.prog
            )
        sentence = f"{help[0].upper()}{help[1:]}."
        parser: Parser = self._adder.add_parser(
            name, help=help, description=description or sentence
        )
        parser.set_defaults(command=run)
        self.commands[name] = parser
        return parser

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise ValueError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an unknown argument is an error of the command that it was passed to.

        An unknown option is reported before a missing argument, which may be the same one, misspelled.
        """
        arguments = _with_dashes(sys.argv[1:] if args is None else list(args))
        if self._adder is None and not {"-h", "--help"} & {*arguments}:
            end = arguments.index("--") if "--" in arguments else len(arguments)
            names = [word.partition("=")[0] for word in arguments[:end] if word.startswith("--")]
            # argparse takes a word with a space for a value
            if unknown := [name for name in names if name not in self._names() and " " not in name]:
                self._refuse(unknown)
        parsed, unknown = super().parse_known_args(arguments, namespace)
        if unknown:
            self._refuse(unknown)
        return parsed, unknown

    def _refuse(self, unknown: list[str]) -> NoReturn:
        name = next((word for word in unknown if word.startswith("-")), None)
        if name is None:
            self.error(f"unexpected argument {unknown[0]!r}")
        name = name.partition("=")[0]
        nearest = _nearest(name, self._names())
        suggestion = f" (did you mean {nearest}?)" if nearest else ""
        self.error(f"unknown option {name}{suggestion}")

    def _names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"found {value!r}, expected one of {choices}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse takes the text of `--stop=--` for the mark that ends the options, and leaves []
        if action.option_strings and arg_strings == ["--"] and action.nargs in (None, "+"):
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return [value] if action.nargs else value
        # as of a shell's variable that is not set; Path("") would be the current directory
        words = re.split(r"\W|_", str(action.metavar))
        is_path = bool(_PATHS.intersection(words)) or not action.option_strings
        if "" in arg_strings and is_path and action.nargs in (None, "?", "+", "*"):
            raise argparse.ArgumentError(action, "is empty")
        return super()._get_values(action, arg_strings)


_PATHS = {"CHECKPOINT", "DIR", "FILE", "PATH", "RUN"}  # words of the metavars of paths

DTYPES = ("float32", "bfloat16", "float16")


def add_model(parser: Parser) -> None:
    """`--model`, as all commands have it that read a checkpoint."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="Hugging Face or Orbax checkpoint, a training run, or a name on the Hub (owner/name)",
    )


def program_parser(prog: str, description: str, **options: Any) -> Parser:
    """The parser of a whole program: with `--version` and `--print-completion`."""
    parser = Parser(prog=prog, description=description, **options)
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the version number and exit"
    )
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        help="print a script for the shell that completes commands and options, and exit",
    )
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from llama_jax.cli.version import version_line

        print(version_line())
        parser.exit()


class _PrintCompletion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, shell: Any, *_: Any
    ) -> None:
        from llama_jax.cli.completion import completion_script

        assert isinstance(parser, Parser)
        print(completion_script(parser, shell))
        parser.exit()


class _HelpFormatter(argparse.HelpFormatter):
    """Required arguments alone in the usage; defaults in the help; text wrapped line by line."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        alternatives = [group for group in groups if group.required]
        grouped = [action for group in alternatives for action in group._group_actions]
        needed = [a for a in actions if a.required or not a.option_strings or a in grouped]
        self._prog = f"{self._prog} [options]"
        super().add_usage(usage, needed, alternatives, prefix)

    def _format_usage(self, *arguments: Any) -> str:
        """Argparse indents by the length of the name, which leaves no room on a narrow terminal."""
        width, self._width = self._width, 10_000
        text = super()._format_usage(*arguments).strip()
        self._width = width
        lines = textwrap.wrap(
            text, width, subsequent_indent=" " * 7, break_long_words=False, break_on_hyphens=False
        )
        return "\n".join(lines) + "\n\n"

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not action.option_strings or action.required or "default" in text:
            return text
        if default in (None, False, argparse.SUPPRESS) or default in ([], ()):
            return text
        shown = " ".join(default) if isinstance(default, list | tuple) else default
        shown = repr(shown) if str(shown) != str(shown).strip() else str(shown)
        return f"{text} (default: {shown.replace('%', '%%')})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Each line is a paragraph, or "term  what it is", which is indented below the second part."""

        def fill(line: str) -> str:
            term = re.match(r"\s*\S+( \S+)*\s{2,}", line)
            hanging = indent + " " * (len(term.group()) if term else 0)
            return textwrap.fill(line, width, initial_indent=indent, subsequent_indent=hanging)

        return "\n".join(map(fill, text.strip("\n").splitlines()))


def _with_dashes(arguments: Sequence[str]) -> list[str]:
    """Underscores in the names of options become dashes, up to the `--` that ends options."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    spelled = []
    for word in arguments[:end]:
        name, sign, value = word.partition("=")
        spelled.append(name.replace("_", "-") + sign + value if word.startswith("--") else word)
    return [*spelled, *arguments[end:]]


def _nearest(name: str, names: Sequence[str]) -> str | None:
    import difflib

    last = name.lstrip("-")
    return next(
        (text for text in names if text.endswith(f".{last}")),
        next(iter(difflib.get_close_matches(name, names, n=1)), None),
    )


@contextmanager
def option_names(options: argparse.Namespace, **renamed: str) -> Iterator[None]:
    """Make errors name the option that the user typed instead of the function's argument.

    Args:
        options: errors about an argument whose option is None are left as they are.
        renamed: the option of an argument, where they have different names.
    """
    try:
        yield
    except ValueError as error:
        argument, colon, problem = str(error).partition(": ")
        option = renamed.get(argument, argument)
        if not colon or getattr(options, option, None) is None:
            raise
        raise ValueError(f"--{option.replace('_', '-')}: {problem}") from None


def integer(text: str) -> int:
    """An integer, as argparse's `type`."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an integer") from None


def number(text: str) -> float:
    """A number, as argparse's `type`."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number") from None


def positive(text: str) -> int:
    """An integer of at least one, as argparse's `type`."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive integer")
    return value


def not_negative(text: str) -> int:
    """An integer of at least zero, as argparse's `type`."""
    value = integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an integer of at least 0")
    return value


def seed(text: str) -> int:
    """An integer that `jax.random.key` takes, as argparse's `type`."""
    value = integer(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an integer of at most 64 bits")
    return value


def some_text(value: str) -> str:
    """Text that is not empty, as argparse's `type`."""
    try:
        value.encode()
    except UnicodeEncodeError:  # the shell passes bytes on as they are
        raise argparse.ArgumentTypeError("found bytes that are not UTF-8, expected text") from None
    if not value:
        raise argparse.ArgumentTypeError("found an empty text, expected at least one character")
    return value


def size_argument(text: str) -> int:
    """`size` as argparse's `type`, whose own message for a ValueError would hide the reason."""
    try:
        return size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
