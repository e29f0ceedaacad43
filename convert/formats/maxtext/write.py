"""Write MaxText's parameter-only checkpoints, a layer's tensor at a time.

DST/0/items is what MaxText's `load_parameters_path` takes; DST/config.yml has the settings of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from convert import casting
from convert.checkpoint import Checkpoint
from convert.formats.directory import write_config_and_companions
from convert.formats.llama_tensors import rotary_heads, to_pairs
from convert.formats.maxtext.names import LAYERS, rule_of
from convert.formats.maxtext.settings import FILE, config_of, rope_order, settings_of
from convert.formats.orbax.write import create_array, write_tree, write_values
from convert.formats.orbax.write import target_specs as orbax_specs
from convert.formats.trees.name_map import DIMENSIONS, Rule
from convert.formats.trees.scaling import reachable, unscaled
from convert.formats.trees.tiles import copy
from convert.same_function import config_differences
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.buffers import empty
from llama_jax.files.staging import write_text

_ITEMS = "0/items"


def target_specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as they will be: a stack has one dtype, the widest of its layers'.

    Raises:
        ValueError: a model that MaxText's Llama cannot express, naming the field.
    """
    config = LlamaConfig.from_dict(checkpoint.config)
    try:
        settings = settings_of(config)
    except ValueError as error:
        raise ValueError(f"MaxText cannot hold this model: {error}") from None
    dimensions = {name: getattr(config, name) for name in (*DIMENSIONS, "tie_word_embeddings")}
    expressible = config_of(settings, dimensions, None)
    if differences := config_differences(checkpoint.config, expressible.to_dict()):
        raise ValueError(f"MaxText cannot hold this model: {'; '.join(differences)}")
    return orbax_specs(checkpoint, dtype)


def cast_rule(checkpoint: Checkpoint, dtype: str | None) -> casting.CastRule:
    """Values are cast; queries become what is read back once they are divided by sqrt(head_dim)."""
    config = LlamaConfig.from_dict(checkpoint.config)

    def rule(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        values = casting.cast(name, values, dtype)
        return reachable(values, rule_of(name)[0].factor(config))

    return rule


def losses(checkpoint: Checkpoint) -> list[str]:
    """The rounding of queries; and a setting that has to be kept."""
    config = LlamaConfig.from_dict(checkpoint.config)
    notes = []
    if math.frexp(math.sqrt(config.head_size))[0] != 0.5:
        notes.append(f"queries are stored divided by sqrt({config.head_size}), which rounds them")
    if config.tie_word_embeddings:
        notes.append("MaxText has to run with normalize_embedding_logits: false, as in config.yml")
    return notes


def write(
    checkpoint: Checkpoint,
    path: Path,
    progress: Callable[[int], None],
    *,
    scan_layers: bool = True,
) -> None:
    """Write `checkpoint` into the new directory `path`.

    Args:
        scan_layers: whether layers are stacked, as MaxText's setting of that name.

    Raises:
        OSError, ValueError: the disk is full or broken; also whatever `checkpoint.load` raises.
    """
    config = LlamaConfig.from_dict(checkpoint.config)
    settings = settings_of(config, scan_layers)
    path.mkdir()
    items = path / _ITEMS
    items.parent.mkdir()
    write_tree(items, {_array_of(spec.name, scan_layers): None for spec in checkpoint.tensors})
    created: set[str] = set()
    for spec in checkpoint.tensors:
        rule, layer = rule_of(spec.name)
        shape = rule.stored_shape(spec.shape, config)
        assert shape is not None
        axis = rule.layer_axis or 0
        if not scan_layers:
            layer = None
        array = _array_of(spec.name, scan_layers)
        if array not in created:
            created.add(array)
            layers = None if layer is None else config.num_hidden_layers
            create_array(items / array, replace(spec, shape=shape), layers, axis)
        values = checkpoint.load(spec.name)
        if rope_order(settings) == "pairs":
            values = to_pairs(values, rotary_heads(spec.name, config))
        values = unscaled(values, rule.factor(config))
        write_values(items / array, _stored(values, rule, shape), layer, axis)
        del values  # before the next is read
        progress(spec.nbytes)
    write_text(path / FILE, yaml.safe_dump(settings))
    write_config_and_companions(checkpoint, path)


def _array_of(name: str, scan_layers: bool) -> str:
    """The keys of a tensor's array, joined by dots."""
    rule, layer = rule_of(name)
    layers = "layers" if scan_layers else f"layers_{layer}"
    return f"params.params.{rule.array.replace(LAYERS, layers).replace('/', '.')}"


def _stored(values: np.ndarray, rule: Rule, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor as MaxText's array of `shape`."""
    if rule.transpose is None:
        return values
    result = empty(shape, values.dtype)
    moved = result.transpose(rule.transpose)
    copy(moved, values.reshape(moved.shape))
    return result
