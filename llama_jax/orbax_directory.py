"""Causal models out of Orbax directories: runs of `python -m train`, or `python -m convert --to orbax`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from llama_jax.arguments import first_line
from llama_jax.causal_lm import LlamaForCausalLM, read_generation_config
from llama_jax.config import LlamaConfig

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


def load_orbax(path: Path, dtype: Any = None) -> LlamaForCausalLM:
    """The model, on one device.

    Args:
        dtype: of the weights; None keeps the stored one.

    Raises:
        ValueError: no checkpoint, one that is damaged, or of another model than config.json.
    """
    home, params = locate(path)
    config = LlamaConfig.from_pretrained(home)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(params.absolute()).item_metadata.tree
            dtype = dtype or jax.tree.leaves(stored)[0].dtype
            abstract = nnx.eval_shape(
                lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype)
            )
            graphdef, state = nnx.split(abstract)
            wanted = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                nnx.to_pure_dict(state),
            )
            found, expected = (
                jax.tree.map(lambda leaf: tuple(leaf.shape), tree) for tree in (stored, wanted)
            )
            if found != expected:
                raise ValueError("its arrays are others than config.json has")
            restored = checkpointer.restore(params.absolute(), wanted)
    except Exception as error:  # Orbax and TensorStore raise whatever is wrong
        raise ValueError(
            f"{params}: not a checkpoint of this model ({first_line(error)})"
        ) from None
    nnx.replace_by_pure_dict(state, restored)
    model = nnx.merge(graphdef, state)
    model.generation_config = read_generation_config(home, config)
    return model
