"""`--rename`: other names for the tensors of a source, before its model is looked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from llama_jax.files.json_object import read_json_object

Rename = Callable[[str], str]
_Value = TypeVar("_Value")


def read_rename(path: Path) -> Rename:
    """What a JSON file of regular expressions and replacements does to a name: each in turn.

    Raises:
        ValueError: no such file, an expression that is none, or a replacement for a group that it lacks.
    """
    rules = []
    for pattern, replacement in read_json_object(path).items():
        if not isinstance(replacement, str):
            raise ValueError(f"{path}: {pattern!r}: found {replacement!r:.80}, expected a text")
        try:
            compiled = re.compile(pattern)
            compiled.sub(replacement, "")  # checks the replacement, whether it matches or not
        except (re.error, IndexError) as error:
            raise ValueError(f"{path}: {pattern!r}: {replacement!r}: {error}") from None
        rules.append((compiled, replacement))

    def rename(name: str) -> str:
        for compiled, replacement in rules:
            name = compiled.sub(replacement, name)
        return name

    return rename


def renamed(values: Mapping[str, _Value], rename: Rename | None) -> dict[str, _Value]:
    """Values by their new names. Raises ValueError where two names become one.

    >>> renamed({"blocks.0.w": 1}, lambda name: name.replace("blocks", "layers"))
    {'layers.0.w': 1}
    """
    if rename is None:
        return dict(values)
    before: dict[str, str] = {}
    for name in values:
        other = before.setdefault(rename(name), name)
        if other != name:
            raise ValueError(f"rename: {other} and {name} both become {rename(name)}")
    return {new: values[old] for new, old in before.items()}
