"""A checkpoint that is read in parts, so that only one layer of it need be in memory."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.checkpoints.match import match_checkpoint
from llama_jax.checkpoints.safetensors_read import StoredTensor, read_tensor
from llama_jax.checkpoints.weight_files import open_weights
from llama_jax.files.json_object import read_json_object
from llama_jax.formatting import summarize

Tensors = dict[str, np.ndarray]

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Checkpoint(NamedTuple):
    """A Hugging Face directory whose tensors fit its config; no values are read yet.

    fields: config.json, completed with defaults. stored: the file and offset of each tensor, by name.
    """

    directory: Path
    fields: Mapping[str, Any]
    config: LlamaConfig
    stored: Mapping[str, StoredTensor]

    @property
    def head(self) -> str:
        """The name of the output projection's weight."""
        return HEAD if HEAD in self.stored else EMBEDDING


def open_checkpoint(directory: Path) -> Checkpoint:
    """Raises ValueError, in one line: not a Llama, or tensors missing, unexpected or of wrong shapes."""
    config = LlamaConfig.from_pretrained(directory)
    weights = open_weights(directory)
    if weights.scheme:
        raise ValueError(
            f"{directory}: the weights are quantized ({weights.scheme}); compare what they are dequantized "
            f"to: python -m convert {directory} DIR"
        )
    match = match_checkpoint(LlamaForCausalLM, config, weights, directory)
    if match.problems:
        title = f"{directory}: {len(match.problems)} problems"
        raise ValueError(summarize(title, match.problems))
    # transformers' defaults; not for rotary fields, which each program must read by itself
    defaults = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("rope_parameters", "extra_fields")
    }
    fields = defaults | read_json_object(directory / "config.json")
    return Checkpoint(directory, fields, config, match.tensors)


def read(checkpoint: Checkpoint, name: str, dtype: Any) -> np.ndarray:
    """One tensor, cast to `dtype`. Raises ValueError for values that are not finite."""
    stored = checkpoint.stored[name]
    out = np.empty(stored.shape, dtype)
    if not read_tensor(stored, out):
        raise ValueError(f"{checkpoint.directory}: {name} holds non-finite values as {out.dtype}")
    return out


def read_layer(checkpoint: Checkpoint, layer: int, dtype: Any) -> Tensors:
    """The tensors of one decoder layer, by their names in it."""
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): read(checkpoint, name, dtype)
        for name in checkpoint.stored
        if name.startswith(prefix)
    }


def require_same_shapes(one: Checkpoint, other: Checkpoint) -> None:
    """Raises ValueError naming every tensor whose shape differs, or that only one of them has."""
    shapes = [{name: list(t.shape) for name, t in c.stored.items()} for c in (one, other)]
    differences = [
        f"{name}: {shapes[0].get(name, 'absent')} and {shapes[1].get(name, 'absent')}"
        for name in sorted(shapes[0].keys() | shapes[1].keys())
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    if differences:
        title = f"{one.directory} and {other.directory}: {len(differences)} tensors differ in shape"
        raise ValueError(summarize(title, differences, limit=3))
