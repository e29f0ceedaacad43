"""`--layers`: a model of some of the layers."""

from __future__ import annotations

import re
from dataclasses import replace

from convert.checkpoint import Checkpoint

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")


def with_layers(checkpoint: Checkpoint, kept: str) -> Checkpoint:
    """The model without all but some layers, which are counted anew from 0.

    Args:
        kept: as in "0-15" or "0-3,8,12-15", both ends included, in ascending order.

    Raises:
        ValueError: layers that the model does not have.
    """
    count = int(checkpoint.config["num_hidden_layers"])
    layers = _numbers(kept, count)
    place = {layer: number for number, layer in enumerate(layers)}
    source, tensors = {}, []
    for spec in checkpoint.tensors:
        match = _LAYER.fullmatch(spec.name)
        if match is not None and int(match[2]) not in place:
            continue
        name = spec.name
        if match is not None:
            name = f"{match[1]}{place[int(match[2])]}{match[3]}"
        source[name] = spec.name
        tensors.append(replace(spec, name=name))
    return replace(
        checkpoint,
        config=dict(checkpoint.config) | {"num_hidden_layers": len(layers)},
        tensors=tuple(tensors),
        load=lambda name: checkpoint.load(source[name]),
        notes=(*checkpoint.notes, f"layers {kept} of {count} are kept and counted anew"),
    )


def _numbers(text: str, count: int) -> list[int]:
    """Layers from "0-3,8".

    >>> _numbers("0-2,5", 8)
    [0, 1, 2, 5]
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None:
            raise ValueError(f"layers: found {text!r:.80}, expected numbers such as 0-15 or 0-3,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= count or last < first:
            raise ValueError(f"layers: found {part.strip()}, the model has 0-{count - 1}")
        numbers += range(first, last + 1)
    if numbers != sorted(set(numbers)):
        raise ValueError(f"layers: found {text!r:.80}, expected each once, in ascending order")
    return numbers
