"""`--cast-only`: a dtype for some tensors, while the others keep theirs."""

from __future__ import annotations

import re
from dataclasses import replace

from convert.checkpoint import DTYPES, Checkpoint


def with_cast(checkpoint: Checkpoint, pattern: str, dtype: str) -> Checkpoint:
    """The checkpoint whose tensors are to be written in `dtype` where `pattern` is found in their names.

    Args:
        pattern: a regular expression.
        dtype: a key of DTYPES.

    Raises:
        ValueError: no regular expression, no tensor that matches, or another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"cast_only: found dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"cast_only: {pattern!r} is no regular expression ({error})") from None
    tensors = tuple(
        replace(spec, dtype=DTYPES[dtype]) if matches(spec.name) else spec
        for spec in checkpoint.tensors
    )
    count = sum(matches(spec.name) is not None for spec in tensors)
    if not count:
        raise ValueError(f"cast_only: no tensor's name has {pattern!r}; one is {tensors[0].name}")
    note = f"{count} of {len(tensors)} tensors are cast to {dtype}, the others are left as they are"
    return replace(checkpoint, tensors=tensors, dtype=None, notes=(*checkpoint.notes, note))
