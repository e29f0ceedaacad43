"""Meta's own checkpoints: `params.json` and `consolidated.NN.pth`, one shard for each parallel process.

What the format cannot say (the context length, the ids of bos and eos) is written as a config.json beside,
which Meta's code does not look at.
"""

from convert.formats.meta.read import read, recognizes
from convert.formats.meta.write import losses, target_specs, write
from convert.formats.plain import cast_rule, stored_bytes

__all__ = [
    "cast_rule",
    "losses",
    "read",
    "recognizes",
    "stored_bytes",
    "target_specs",
    "write",
]
