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
    """The options as TOML, which has no None: it is left out where it is the default, else "None"."""

    def plain(value: Any, default: Any) -> Any:
        if dataclasses.is_dataclass(value):
            pairs = {
                item.name: (getattr(value, item.name), getattr(default, item.name))
                for item in dataclasses.fields(value)
            }
            return {name: plain(*pair) for name, pair in pairs.items() if pair != (None, None)}
        if isinstance(value, tuple):
            return [plain(inner, None) for inner in value]
        return str(value) if value is None or isinstance(value, Path) else value

    return tomli_w.dumps(plain(options, type(options)()))


def flags_of(path: Path) -> list[str]:
    """The flags that a TOML file stands for, so that one parser checks both.

    Raises:
        ValueError: no such file, not TOML, or a key that is none of `RunOptions`.
    """
    try:
        values = tomllib.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: is not TOML ({error})") from None
    flags: list[str] = []

    def add(prefix: str, table: Mapping[str, Any], known: Any) -> None:
        names = {item.name: item for item in dataclasses.fields(known)}
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
                before, _, last = flag.rpartition(".")
                flags.append(f"--{flag}" if value else f"--{before + '.' * bool(before)}no-{last}")
            else:
                # the form with = keeps a value that begins with a dash from being read as a flag
                many = isinstance(value, list)
                flags.extend([f"--{flag}", *map(str, value)] if many else [f"--{flag}={value}"])

    add("", values, RunOptions())
    return flags
