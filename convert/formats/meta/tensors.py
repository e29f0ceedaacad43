"""The tensors of a Meta checkpoint: their names, and how its pieces go together.

Names and splitting are those of Meta's `model.py` over fairscale's layers: ColumnParallelLinear cuts a
weight's rows, RowParallelLinear its columns; norms are whole in every piece. The embedding was cut by
columns in Llama 1 and 2, by rows since. With more pieces than key/value heads, neighbours hold the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convert.formats.rotary_rows import to_halves
from convert.formats.torch_files import TorchFile
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"


class Slot(NamedTuple):
    """One tensor: Meta's name, the whole shape, the axes it may be cut along, heads of rotary pairs."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    heads: int = 0


def slots(config: LlamaConfig) -> dict[str, Slot]:
    """Every tensor of a model by its Hugging Face name; the head too, if it is tied or not."""
    e, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    h, k, d = config.num_attention_heads, config.kv_heads, config.head_size
    found = {"model.embed_tokens.weight": Slot(EMBEDDING, (v, e), (0, 1))}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}", f"layers.{i}"
        found |= {
            f"{ours}.input_layernorm.weight": Slot(f"{theirs}.attention_norm.weight", (e,), (0,)),
            f"{ours}.post_attention_layernorm.weight": Slot(
                f"{theirs}.ffn_norm.weight", (e,), (0,)
            ),
        }
        for our, their, shape, axis, heads in (
            ("self_attn.q_proj", "attention.wq", (h * d, e), 0, h),
            ("self_attn.k_proj", "attention.wk", (k * d, e), 0, k),
            ("self_attn.v_proj", "attention.wv", (k * d, e), 0, 0),
            ("self_attn.o_proj", "attention.wo", (e, h * d), 1, 0),
            ("mlp.gate_proj", "feed_forward.w1", (f, e), 0, 0),
            ("mlp.up_proj", "feed_forward.w3", (f, e), 0, 0),
            ("mlp.down_proj", "feed_forward.w2", (e, f), 1, 0),
        ):
            slot = Slot(f"{theirs}.{their}.weight", shape, (axis,), heads)
            found[f"{ours}.{our}.weight"] = slot
    found["model.norm.weight"] = Slot("norm.weight", (e,), (0,))
    found["lm_head.weight"] = Slot(HEAD, (v, e), (0,))
    return found


@dataclass(frozen=True)
class Merged:
    """A tensor in pieces that follow each other along `axis`, `copies` neighbours holding the same."""

    spec: TensorSpec
    slot: Slot
    pieces: Sequence[TorchFile]
    axis: int
    copies: int

    def read(self) -> np.ndarray:
        """The whole tensor, its rows in Hugging Face's order. Raises ValueError for bad pieces."""
        values = self._whole()
        return to_halves(values, self.slot.heads) if self.slot.heads else values

    def first_row(self) -> np.ndarray:
        """A look at it that reads little."""
        rows = [piece.load(self.slot.name, rows=1) for piece in self.pieces[:: self.copies]]
        return np.concatenate(rows, axis=1) if self.axis == 1 else rows[0]

    def _whole(self) -> np.ndarray:
        name = self.slot.name
        if len(self.pieces) == 1:
            return self.pieces[0].load(name)
        whole = np.empty(self.spec.shape, self.spec.dtype)
        along, step = np.moveaxis(whole, self.axis, 0), whole.shape[self.axis] * self.copies
        step //= len(self.pieces)
        for i, piece in enumerate(self.pieces):
            values = np.moveaxis(piece.load(name), self.axis, 0)
            start = i // self.copies * step
            place = along[start : start + step]
            if i % self.copies == 0:
                place[...] = values
            elif not (place == values).all():
                path = piece.tensors[name].path
                raise ValueError(
                    f"{path}: tensor {name}: differs from piece {i - 1}, expected a copy"
                )
        return whole


def merge(name: str, slot: Slot, pieces: Sequence[TorchFile]) -> tuple[Merged | None, list[str]]:
    """The tensor `name` out of its pieces, or what is wrong with them."""
    found = [piece.tensors.get(slot.name) for piece in pieces]
    stored = [tensor for tensor in found if tensor is not None]
    if len(stored) < len(found):
        where = "" if not stored else f" in piece {found.index(None)}"
        return None, [f"{slot.name}: missing{where}"]
    kinds = sorted({f"{tensor.dtype}{list(tensor.shape)}" for tensor in stored})
    if len(kinds) > 1:
        return None, [f"{slot.name}: found {' and '.join(kinds)}, expected one kind in all pieces"]
    dtype, shape = stored[0].dtype, stored[0].shape
    if dtype not in FLOAT_DTYPES:
        return None, [f"{slot.name}: found dtype {dtype}, expected {', '.join(FLOAT_DTYPES)}"]
    for axis in slot.axes:
        whole = list(slot.shape)
        if len(shape) != len(whole) or not shape[axis]:
            continue
        copies, rest = divmod(shape[axis] * len(pieces), whole[axis])
        whole[axis] = shape[axis]
        if list(shape) == whole and copies and not rest and len(pieces) % copies == 0:
            spec = TensorSpec(name, FLOAT_DTYPES[dtype], slot.shape)
            return Merged(spec, slot, pieces, axis, copies), []
    expected = f"{list(slot.shape)} of {len(pieces)} pieces together"
    return None, [f"{slot.name}: found shape {list(shape)}, expected {expected}"]
