"""run.toml: the options as TOML, and a TOML file as command-line flags."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from llama_jax.text.lines import read_text
from train.options import RunOptions


def to_toml(options: Any) -> str:
    """The options as TOML, which has no None: left out where it is the default, else written "None"."""

    def plain(value: Any, default: Any) -> Any:
        if dataclasses.is_dataclass(value):
            pairs = {
                field.name: (getattr(value, field.name), getattr(default, field.name))
                for field in dataclasses.fields(value)
            }
            return {name: plain(*pair) for name, pair in pairs.items() if pair != (None, None)}
        if isinstance(value, tuple):
            return [plain(element, None) for element in value]
        return str(value) if value is None or isinstance(value, Path) else value

    return tomli_w.dumps(plain(options, type(options)()))


def flags_of(path: Path) -> list[str]:
    """A TOML file as command-line flags, so that one parser checks both.

    Raises:
        ValueError: a file that cannot be read or is not TOML, or a key that `RunOptions` does not have.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return flags_of_text(text, path)


def flags_of_text(text: str, path: Path) -> list[str]:
    """The text of a TOML file as command-line flags. Raises as `flags_of`; `path` is for the message."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None
    flags: list[str] = []

    def add(prefix: str, table: Mapping[str, Any], known: Any) -> None:
        names = [field.name for field in dataclasses.fields(known)]
        for key, value in table.items():
            name = key.replace("-", "_")
            if name not in names:
                raise ValueError(f"{path}: found {prefix}{key}, expected one of {', '.join(names)}")
            inner = getattr(known, name)
            if dataclasses.is_dataclass(inner):
                if not isinstance(value, Mapping):
                    raise ValueError(f"{path}: found {prefix}{key} = {value!r}, expected a table")
                add(f"{prefix}{name}.", value, inner)
                continue
            flags.extend(flags_of_value(f"{prefix}{name}", value))

    add("", values, RunOptions())
    return flags


def flags_of_value(name: str, value: Any) -> list[str]:
    """An option and its value, as TOML has them, as command-line flags.

    >>> flags_of_value("model.scan_unroll", 2), flags_of_value("log.tensorboard", False)
    (['--model.scan-unroll=2'], ['--log.no-tensorboard'])
    """
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        group, dot, option = flag.rpartition(".")
        return [f"--{flag}" if value else f"--{group}{dot}no-{option}"]
    # the form with = keeps a value that begins with a dash from being read as a flag
    return [f"--{flag}", *map(str, value)] if isinstance(value, list) else [f"--{flag}={value}"]
