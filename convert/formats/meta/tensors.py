"""The tensors of a Meta checkpoint: their names, and how its shards are merged.

Names and splitting are those of Meta's `model.py` over fairscale's layers: ColumnParallelLinear splits a
weight's rows, RowParallelLinear its columns; every shard has the norms complete. The embedding was split by
columns in Llama 1 and 2, by rows since. With more shards than key/value heads, neighbors hold the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from convert.formats.llama_tensors import renamed, rotary_heads, tensor_shapes, to_halves
from convert.formats.torch_files import TorchFile
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.buffers import empty

_MODULES = {  # Hugging Face's -> Meta's
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
_SPLIT_COLUMNS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


class MetaTensor(NamedTuple):
    """One tensor of the model as Meta has it."""

    name: str
    shape: tuple[int, ...]
    """Merged."""
    axes: tuple[int, ...]
    """Along which it may be split into shards."""
    heads: int
    """Over how many heads its rows are reordered; 0 where they are not."""


def meta_tensors(config: LlamaConfig) -> dict[str, MetaTensor]:
    """Every tensor of a model by its Hugging Face name; among them the head, whether it is tied or not."""
    assert not config.attention_bias, "Meta's models have no biases"
    assert not config.mlp_bias, "Meta's models have no biases"
    shapes = tensor_shapes(replace(config, tie_word_embeddings=False))
    tensors = {}
    for name, shape in shapes.items():
        axes: tuple[int, ...] = (1,) if name.endswith(_SPLIT_COLUMNS) else (0,)
        if name == "model.embed_tokens.weight":
            axes = (0, 1)
        meta_name = renamed(name, _MODULES, layers="layers")
        tensors[name] = MetaTensor(meta_name, shape, axes, rotary_heads(name, config))
    return tensors


@dataclass(frozen=True)
class MergedTensor:
    """A tensor whose shards follow each other along `axis`, `copies` neighbors holding the same."""

    spec: TensorSpec
    tensor: MetaTensor
    shards: Sequence[TorchFile]
    axis: int
    copies: int

    def read(self) -> np.ndarray:
        """The merged tensor, its rows in Hugging Face's order. Raises ValueError for bad shards."""
        return to_halves(self._merged(), self.tensor.heads)

    def first_row(self) -> np.ndarray:
        """Its first row, read without the rest."""
        rows = [shard.load(self.tensor.name, rows=1) for shard in self.shards[:: self.copies]]
        return np.concatenate(rows, axis=1) if self.axis == 1 else rows[0]

    def _merged(self) -> np.ndarray:
        name = self.tensor.name
        if len(self.shards) == 1:
            return self.shards[0].load(name)
        merged = empty(self.spec.shape, self.spec.dtype)
        by_axis = np.moveaxis(merged, self.axis, 0)
        step = len(by_axis) * self.copies // len(self.shards)
        for number, shard in enumerate(self.shards):
            values = np.moveaxis(shard.load(name), self.axis, 0)
            start = number // self.copies * step
            part = by_axis[start : start + step]
            if number % self.copies == 0:
                part[...] = values
            elif not (part == values).all():
                path = shard.tensors[name].path
                raise ValueError(
                    f"{path}: tensor {name}: differs from shard {number - 1}, expected a copy"
                )
        return merged


def merge(
    name: str, tensor: MetaTensor, shards: Sequence[TorchFile]
) -> tuple[MergedTensor | None, list[str]]:
    """The tensor `name` from its shards, or what is wrong with them."""
    stored = [tensor.name in shard.tensors for shard in shards]
    if not all(stored):
        where = f" in shard {stored.index(False)}" if any(stored) else ""
        return None, [f"{tensor.name}: missing{where}"]
    parts = [shard.tensors[tensor.name] for shard in shards]
    kinds = sorted({f"{part.dtype}{list(part.shape)}" for part in parts})
    if len(kinds) > 1:
        return None, [
            f"{tensor.name}: found {' and '.join(kinds)}, expected one kind in all shards"
        ]
    dtype, shape = parts[0].dtype, parts[0].shape
    if dtype not in FLOAT_DTYPES:
        return None, [f"{tensor.name}: found dtype {dtype}, expected {', '.join(FLOAT_DTYPES)}"]
    for axis in tensor.axes:
        if (copies := _copies(shape, tensor.shape, axis, len(shards))) is not None:
            spec = TensorSpec(name, FLOAT_DTYPES[dtype], tensor.shape)
            return MergedTensor(spec, tensor, shards, axis, copies), []
    expected = f"{list(tensor.shape)} of {len(shards)} shards together"
    return None, [f"{tensor.name}: found shape {list(shape)}, expected {expected}"]


def _copies(part: tuple[int, ...], merged: tuple[int, ...], axis: int, shards: int) -> int | None:
    """How often `shards` parts make up the merged tensor along `axis`; None where they do not."""
    if len(part) != len(merged) or not part[axis]:
        return None
    if any(n != m for i, (n, m) in enumerate(zip(part, merged, strict=True)) if i != axis):
        return None
    copies, rest = divmod(part[axis] * shards, merged[axis])
    return copies if copies and not rest and shards % copies == 0 else None
