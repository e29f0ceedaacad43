"""Names of the parts of a run's state."""

import re
from typing import Any

from jax.tree_util import SequenceKey, keystr


def part_name(path: tuple[Any, ...]) -> str:
    """Of a leaf of (parameters, optimizer state): without the places in the chain of an optimizer's rules.

    >>> from jax.tree_util import DictKey, GetAttrKey
    >>> part_name((SequenceKey(1), SequenceKey(0), GetAttrKey("nu"), DictKey("norm")))
    'nu.norm'
    """
    keys = tuple(key for key in path if not isinstance(key, SequenceKey))
    return re.sub(r"^.*\b(?=(?:nu|mu|trace)\.)", "", keystr(keys, simple=True, separator="."))


def part_in_words(name: str, layer: int | None) -> str:
    """A part, of one layer where layers are stacked.

    >>> part_in_words("model.layers.mlp.up_proj.weight", 1)
    'model.layers.mlp.up_proj.weight of layer 1'
    """
    return name if layer is None else f"{name} of layer {layer}"
