"""What the command lines share: mistakes in one line, counts, sizes."""

import argparse
from typing import Any, NoReturn

from llama_jax.formatting import size


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are a ValueError of one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise ValueError(f"{message}; see --help")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse takes the text of `--stop=--` for the mark that ends the options, and leaves []
        if action.option_strings and arg_strings == ["--"] and action.nargs in (None, "+"):
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return [value] if action.nargs else value
        return super()._get_values(action, arg_strings)


def positive(text: str) -> int:
    """A count of at least one, as argparse's `type`."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive integer")
    return value


def some_text(value: str) -> str:
    """Text that is not empty, as argparse's `type`."""
    try:
        value.encode()
    except UnicodeEncodeError:  # what the shell passed on as it was
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
