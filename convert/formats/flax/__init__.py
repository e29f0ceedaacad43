"""Flax's msgpack files: transformers 4's FlaxLlamaForCausalLM, single or sharded, and EasyLM's streams.

Transformers 5 dropped Flax, and EasyLM is no longer maintained, so these are only read.
"""

from convert.formats.flax.read import read, recognizes

__all__ = ["read", "recognizes"]
