"""GGUF: one file, or several pieces, of a Llama for llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What its metadata and tensors mean for a
Llama is defined by llama.cpp, in its `llama` architecture and its `convert_hf_to_gguf.py`.
"""

from convert.formats.gguf.read import read, recognizes
from convert.formats.gguf.write import cast_rule, losses, stored_bytes, target_specs, write

__all__ = [
    "cast_rule",
    "losses",
    "read",
    "recognizes",
    "stored_bytes",
    "target_specs",
    "write",
]
