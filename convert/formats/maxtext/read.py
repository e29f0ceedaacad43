"""Read MaxText's checkpoints: parameters alone or a whole training state, layers stacked or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.companions import require_inside
from convert.formats.maxtext.names import maxtext_map
from convert.formats.maxtext.settings import (
    FILE,
    config_of,
    dimensions_of,
    read_settings,
    rope_order,
)
from convert.formats.orbax.arrays import open_arrays
from convert.formats.trees.locate import find_tree, home_of
from convert.formats.trees.name_map import NameMap
from convert.formats.trees.read import read_tree, require_tree
from convert.same_function import config_differences
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import ORBAX_METADATA

_KEYS = (b'"token_embedder"', b'"pre_self_attention_layer_norm"')


def recognizes(path: Path) -> bool:
    """Whether it looks like one: a run, step or tree of Orbax whose arrays have MaxText's names."""
    try:
        tree = find_tree(path)
        content = b"" if tree is None else (tree / ORBAX_METADATA).read_bytes()
    except (OSError, ValueError):
        return False
    return any(key in content for key in _KEYS)


def read(path: Path, *, tokenizer: bool = True, rope: str | None = None) -> Checkpoint:
    """The Llama in a checkpoint of MaxText's; no values are read until `load` is called.

    Args:
        tokenizer: whether to read it; if not, errors in it do not matter.
        rope: order of the rows of queries and keys, "halves" or "pairs", where no config.yml tells it.

    Raises:
        ValueError: with every problem: arrays that are missing, unexpected, misshapen or damaged; neither
            a config.json nor a config.yml, or two that differ; an unknown order of rows.
    """
    tree = require_tree(path)
    arrays = open_arrays(tree)
    home, settings_home = (home_of(path, tree, (name,)) for name in ("config.json", FILE))
    settings: dict[str, Any] = {}
    if settings_home is not None:
        require_inside(settings_home, FILE)
        settings = read_settings(settings_home / FILE)
    told = rope_order(settings)
    if rope is not None and told not in (None, rope):
        raise ValueError(f"rope: found {rope}, but {FILE} in {settings_home} says {told}")
    rope = told or rope
    axis = settings.get("param_scan_axis", 1)
    if type(axis) is not int or axis < 0:
        raise ValueError(f"{settings_home}/{FILE}: param_scan_axis: found {axis!r}")
    name_map = _with_axis(maxtext_map(), axis)
    if home is None and settings_home is None:
        raise ValueError(
            f"{path}: found neither a config.json nor MaxText's config.yml, and the arrays do not tell all "
            "of them: put one of them there"
        )
    config, notes = None, []
    if home is not None:
        require_inside(home, "config.json")
        config = LlamaConfig.from_pretrained(home)
    if settings_home is not None:
        try:
            from_settings = config_of(settings, dimensions_of(arrays, name_map, axis), rope)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if config is None:
            config = from_settings
        else:
            same_rows = replace(from_settings, vocab_size=config.vocab_size)
            if differences := config_differences(same_rows.to_dict(), config.to_dict()):
                raise ValueError(f"{path}: {FILE} and config.json differ: {'; '.join(differences)}")
    assert config is not None
    if config.tie_word_embeddings:
        if settings_home is None:
            raise ValueError(
                f"{path}: the embeddings are tied, and the arrays do not tell whether MaxText divides the "
                "logits by sqrt(hidden_size) (normalize_embedding_logits): put its config.yml there"
            )
        if settings.get("normalize_embedding_logits", True):
            name_map = _normalized(name_map)
            notes.append(
                "MaxText divides tied logits by sqrt(hidden_size); here the final norm's weight is divided"
            )
    return read_tree(
        path,
        arrays,
        home or settings_home or path,
        config,
        name_map,
        rope=rope,
        tokenizer=tokenizer,
        notes=notes,
    )


def _with_axis(name_map: NameMap, axis: int) -> NameMap:
    return replace(
        name_map,
        tensor=tuple(
            rule if rule.layer_axis is None else replace(rule, layer_axis=axis)
            for rule in name_map.tensor
        ),
    )


def _normalized(name_map: NameMap) -> NameMap:
    return replace(
        name_map,
        tensor=tuple(
            replace(rule, scale="1 / sqrt(hidden_size)")
            if rule.name == "model.norm.weight"
            else rule
            for rule in name_map.tensor
        ),
    )
