"""MaxText's checkpoints: Orbax trees with its names, its order of axes and its scaling of queries."""

from convert.formats.maxtext.read import read, recognizes
from convert.formats.maxtext.write import cast_rule, losses, target_specs, write
from convert.formats.plain import stored_bytes

__all__ = [
    "cast_rule",
    "losses",
    "read",
    "recognizes",
    "stored_bytes",
    "target_specs",
    "write",
]
