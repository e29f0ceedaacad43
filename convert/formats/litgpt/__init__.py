"""LitGPT's checkpoints: `lit_model.pth` and `model_config.yaml`.

Query, key and value projections are one tensor: all queries, all keys, all values (`attn.qkv`), or in older
versions a group's queries, its key and its value, group after group (`attn.attn`). Rotated rows are in
Hugging Face's order.
"""

from convert.formats.litgpt.read import read, recognizes
from convert.formats.litgpt.write import target_specs, write
from convert.formats.plain import cast_rule, losses, stored_bytes

__all__ = [
    "cast_rule",
    "losses",
    "read",
    "recognizes",
    "stored_bytes",
    "target_specs",
    "write",
]
