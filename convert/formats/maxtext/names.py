"""MaxText's names, as the map beside this file has them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from convert.formats.trees.name_map import NameMap, Rule, read_name_map

LAYERS = r"layers(_(?P<layer>\d+))?"
"""How the map writes the key of the layers."""


@cache
def maxtext_map() -> NameMap:
    """The map in maxtext.toml."""
    return read_name_map(Path(__file__).with_name("maxtext.toml"))


def rule_of(name: str) -> tuple[Rule, int | None]:
    """The rule for a tensor of Hugging Face's, and its layer."""
    for rule in maxtext_map().tensor:
        before, _, after = rule.name.partition("{layer}")
        if name == rule.name:
            return rule, None
        if after and name.startswith(before) and name.endswith(after):
            return rule, int(name[len(before) : -len(after)])
    raise KeyError(name)
