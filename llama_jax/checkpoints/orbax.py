"""Causal models out of Orbax directories: runs of `python -m train`, or `python -m convert --to orbax`."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from llama_jax.checkpoints.fit import OTHER_HEAD, asked_dtype, equal, require_float, widest
from llama_jax.checkpoints.huggingface import warn_ignored
from llama_jax.checkpoints.safetensors_read import all_finite
from llama_jax.config import LlamaConfig
from llama_jax.formatting import first_line, report

Model = TypeVar("Model", bound=nnx.Module)

PARAMS = "params"
CHECKPOINTS = "checkpoints"


def is_orbax(path: Path) -> bool:
    """Whether it looks like one: converted weights, a run, or one step of a run."""
    return (path / PARAMS).is_dir() or (path / CHECKPOINTS).is_dir()


def require_utf8(path: Path) -> None:
    """Raise ValueError for a path that Orbax cannot be told, for it is not UTF-8."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{path}: the path is not UTF-8, or the locale is not; rename it"
        ) from None


def locate(path: Path) -> tuple[Path, Path]:
    """The directory of config.json, and the parameters' checkpoint; of a run, the newest step's.

    Raises:
        ValueError: a run without a checkpoint; a path that is not UTF-8.
    """
    require_utf8(path)
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, path / PARAMS
    if (path / CHECKPOINTS).is_dir():
        steps = sorted(
            int(step.name)
            for step in (path / CHECKPOINTS).iterdir()
            if step.name.isdigit() and (step / PARAMS).is_dir()
        )
        if not steps:
            raise ValueError(f"{path / CHECKPOINTS}: found no checkpoint, expected one")
        return path, path / CHECKPOINTS / str(steps[-1]) / PARAMS
    return path, path / PARAMS


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Without what Orbax warns of that is as it should be: nothing to merge, no metadata of its own."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_orbax(model_class: Callable[..., Model], path: Path, dtype: Any = None) -> Model:
    """The model, on one device.

    Args:
        model_class: `LlamaForCausalLM`, or another class taking `(config, rngs=, dtype=)`.
        dtype: of the weights: JAX's, its name, or torch's; None and "auto" keep the stored one (the widest,
            where several are mixed).

    Raises:
        ValueError: another dtype, no checkpoint, one that is damaged, or of another model than config.json.
    """
    home, params = locate(path)
    config = LlamaConfig.from_pretrained(home)
    dtype = asked_dtype(dtype)
    if dtype is not None:
        dtype = require_float(dtype)
    stored = _stored(params)
    if dtype is None:
        dtype = require_float(widest({np.dtype(leaf.dtype) for leaf in jax.tree.leaves(stored)}))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with _faults_as_ours(params), quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        abstract = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0), dtype=dtype))
        graphdef, state = nnx.split(abstract)
        wanted = nnx.to_pure_dict(state)
        if config.tie_word_embeddings and "lm_head" in stored:
            # the copy of a tied head that some exporters write as well
            wanted["lm_head"] = {"weight": wanted["model"]["embed_tokens"]["weight"]}
        if faults := _misfits(stored, wanted):
            raise ValueError(report(f"{len(faults)} faults", faults))
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), wanted
        )
        restored = checkpointer.restore(params.absolute(), wanted)
        if faults := _bad_values(restored, config):
            raise ValueError(report(f"{len(faults)} faults", faults))
    if config.tie_word_embeddings:
        restored.pop("lm_head", None)
    warn_ignored(config, home)
    nnx.replace_by_pure_dict(state, restored)
    return nnx.merge(graphdef, state)


@contextmanager
def _faults_as_ours(params: Path) -> Iterator[None]:
    """One line about the checkpoint for whatever Orbax and TensorStore raise."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{params}: not a checkpoint of this model ({first_line(error, limit=1000)})"
        ) from None


def _stored(params: Path) -> Any:
    """The tree of the arrays that are stored, without their values."""
    with _faults_as_ours(params), quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(params.absolute()).item_metadata.tree


def flat_params(tree: Any) -> dict[str, Any]:
    """Leaves by their names, parts joined by dots."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(part.key) for part in path): leaf for path, leaf in leaves}


def _misfits(stored: Any, wanted: Any) -> list[str]:
    """Arrays that are missing, unexpected or of another shape than the model's."""
    found, expected = flat_params(stored), flat_params(wanted)
    faults = [f"{name}: missing" for name in expected if name not in found]
    faults += [f"{name}: unexpected" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        one, other = list(found[name].shape), list(expected[name].shape)
        if one != other:
            faults.append(f"{name}: found shape {one}, expected {other}")
    return sorted(faults)


def _bad_values(restored: Any, config: LlamaConfig) -> list[str]:
    """Arrays that are not finite, and a tied head that is not the embedding."""
    arrays = flat_params(restored)
    faults = [
        f"{name}: holds non-finite values as {array.dtype}"
        for name, array in arrays.items()
        if not all_finite(np.asarray(array))
    ]
    if config.tie_word_embeddings and "lm_head.weight" in arrays and not faults:
        pair = ("lm_head.weight", "model.embed_tokens.weight")
        faults += [] if equal(*(np.asarray(arrays[name]) for name in pair)) else [OTHER_HEAD]
    return faults
