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
        values = tomllib.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
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
            flag = f"{prefix}{name}".replace("_", "-")
            if isinstance(value, bool):
                group, dot, option = flag.rpartition(".")
                flags.append(f"--{flag}" if value else f"--{group}{dot}no-{option}")
            else:
                # the form with = keeps a value that begins with a dash from being read as a flag
                is_list = isinstance(value, list)
                flags.extend([f"--{flag}", *map(str, value)] if is_list else [f"--{flag}={value}"])

    add("", values, RunOptions())
    return flags
