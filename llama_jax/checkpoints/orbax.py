"""Load models from Orbax directories: runs of `python -m train`, or written by `python -m convert`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from llama_jax.checkpoints.dtypes import requested_dtype, require_float, widest
from llama_jax.checkpoints.huggingface import warn_ignored
from llama_jax.checkpoints.match import OTHER_HEAD, same_values
from llama_jax.checkpoints.safetensors_read import all_finite
from llama_jax.config import LlamaConfig
from llama_jax.files.download import on_disk
from llama_jax.files.paths import marker_of
from llama_jax.formatting import first_line, summarize

Model = TypeVar("Model", bound=nnx.Module)

PARAMS = "params"
CHECKPOINTS = "checkpoints"


def is_orbax(path: Path) -> bool:
    """Whether a path looks like an Orbax directory: converted weights, a run, or one step of a run."""
    if (path / PARAMS).is_dir():
        return True
    checkpoints = path / CHECKPOINTS
    # other programs' runs have these as well, with trees of other names
    foreign = any(checkpoints.glob("*/*/_METADATA")) and not any(checkpoints.glob(f"*/{PARAMS}"))
    return checkpoints.is_dir() and not foreign


def require_utf8(path: Path) -> None:
    """Raise ValueError for a path that is not UTF-8, which Orbax requires."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{path}: the path is not UTF-8, or the locale is not; rename it"
        ) from None


def locate(path: Path) -> tuple[Path, Path]:
    """The directories of config.json and of the parameters; for a run, those of the newest step.

    Raises:
        ValueError: a run without a checkpoint, or a path that is not UTF-8.
    """
    require_utf8(path)
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, path / PARAMS
    if (path / CHECKPOINTS).is_dir():
        steps = sorted(
            int(step.name)
            for step in (path / CHECKPOINTS).iterdir()
            if step.name.isdigit() and (step / PARAMS).is_dir() and not marker_of(step).exists()
        )
        if not steps:
            raise ValueError(f"{path / CHECKPOINTS}: found no checkpoint, expected one")
        return path, path / CHECKPOINTS / str(steps[-1]) / PARAMS
    return path, path / PARAMS


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Within, Orbax does not warn about missing metadata and the like, which is as intended."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_orbax(model_class: Callable[..., Model], path: Path, dtype: Any = None) -> Model:
    """Load a model onto one device.

    Args:
        model_class: `LlamaForCausalLM` or another class that takes `(config, rngs=, dtype=)`.
        dtype: of the weights: JAX's, its name, or torch's; None and "auto" keep the stored one (the widest,
            if there are several).

    Raises:
        ValueError: an impossible dtype; no checkpoint, a damaged one, or one of another config.json.
    """
    import orbax.checkpoint as ocp  # slow, and most models are in another format

    home, params = locate(path)
    config = LlamaConfig.from_pretrained(home)
    dtype = requested_dtype(dtype)
    if dtype is not None:
        dtype = require_float(dtype)
    stored = _stored_tree(params)
    if dtype is None:
        dtype = require_float(widest({np.dtype(leaf.dtype) for leaf in jax.tree.leaves(stored)}))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with _one_line_errors(params), quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        abstract = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0), dtype=dtype))
        graphdef, state = nnx.split(abstract)
        target = nnx.to_pure_dict(state)
        if config.tie_word_embeddings and "lm_head" in stored:
            # a copy of the tied head, which some exporters write
            target["lm_head"] = {"weight": target["model"]["embed_tokens"]["weight"]}
        if problems := _compare_shapes(stored, target):
            raise ValueError(summarize(f"{len(problems)} problems", problems))
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), target
        )
        restored = checkpointer.restore(on_disk(params).absolute(), target)
        if problems := _check_values(restored, config):
            raise ValueError(summarize(f"{len(problems)} problems", problems))
    if config.tie_word_embeddings:
        restored.pop("lm_head", None)
    warn_ignored(config, home)
    nnx.replace_by_pure_dict(state, restored)
    return nnx.merge(graphdef, state)


@contextmanager
def _one_line_errors(params: Path) -> Iterator[None]:
    """Within, any error of Orbax or TensorStore becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{params}: not a checkpoint of this model ({first_line(error, limit=1000)})"
        ) from None


def _stored_tree(params: Path) -> Any:
    """The tree of the stored arrays, without their values."""
    import orbax.checkpoint as ocp

    with _one_line_errors(params), quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(on_disk(params).absolute()).item_metadata.tree


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their paths, joined by dots."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(part.key) for part in path): leaf for path, leaf in leaves}


def _compare_shapes(stored: Any, target: Any) -> list[str]:
    """Arrays that are missing, unexpected or of another shape than in the model."""
    arrays, params = _named_leaves(stored), _named_leaves(target)
    problems = [f"{name}: missing" for name in params if name not in arrays]
    problems += [f"{name}: unexpected" for name in arrays if name not in params]
    for name in arrays.keys() & params.keys():
        shape, expected = list(arrays[name].shape), list(params[name].shape)
        if shape != expected:
            problems.append(f"{name}: found shape {shape}, expected {expected}")
    return sorted(problems)


def _check_values(restored: Any, config: LlamaConfig) -> list[str]:
    """Arrays that are not finite, and a tied head that differs from the embedding."""
    arrays = _named_leaves(restored)
    problems = [
        f"{name}: holds non-finite values as {array.dtype}"
        for name, array in arrays.items()
        if not all_finite(np.asarray(array))
    ]
    if config.tie_word_embeddings and "lm_head.weight" in arrays and not problems:
        names = ("lm_head.weight", "model.embed_tokens.weight")
        if not same_values(*(np.asarray(arrays[name]) for name in names)):
            problems.append(OTHER_HEAD)
    return problems
