"""Compare the tensors of a checkpoint with the model that they are for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from llama_jax.checkpoints.dtypes import require_float, widest
from llama_jax.checkpoints.names import (
    DECODER_NAME,
    LM_HEAD,
    LOW_RANK,
    TASK_HEADS,
    ParamSlice,
    decoder_prefix,
    flat_params,
    is_code,
    name_table,
    partial_prefix,
    unwrap_names,
)
from llama_jax.checkpoints.safetensors_read import CODE_DTYPES, FLOAT_DTYPES, StoredTensor
from llama_jax.checkpoints.weight_files import ReadRows, StoredWeights, read_rows
from llama_jax.config import LlamaConfig

Model = TypeVar("Model", bound=nnx.Module)

OTHER_HEAD = (
    f"{LM_HEAD}: differs from the embedding although tie_word_embeddings is true; remove the tensor, or "
    "set tie_word_embeddings to false in config.json to use it"
)

_COMPARED_BYTES = 1 << 24


@dataclass(frozen=True)
class CheckpointMatch:
    """The tensors of a checkpoint beside the model that they are for.

    Attributes:
        dtype: of the model.
        abstract: the model's shapes and dtypes.
        table: where each tensor of the model goes.
        tensors: stored tensors, by the model's names.
        embedding: the name of the embedding.
        tied_copy: a tied head that was stored although it is the embedding.
        missing_head: tensors of a task head that the checkpoint lacks.
        problems: everything that does not match.
        wrappers: what was removed from the tensors' names, for people; "" if nothing.
    """

    dtype: np.dtype[Any]
    abstract: Any
    table: dict[str, ParamSlice]
    tensors: dict[str, StoredTensor]
    embedding: str
    tied_copy: StoredTensor | None
    missing_head: list[str]
    problems: list[str]
    wrappers: str = ""


def match_checkpoint(
    model_class: Callable[..., nnx.Module],
    config: LlamaConfig,
    weights: StoredWeights,
    directory: Path,
    dtype: DTypeLike | None = None,
    rows: ReadRows = read_rows,
) -> CheckpointMatch:
    """Compare the tensors of a checkpoint with the model of `config`. All readers use this check.

    No values are read, except those of a tied head that is stored too.

    Args:
        dtype: of the model; None keeps the stored one (the widest, if there are several).
        rows: reads part of a tensor; the default is for safetensors.

    Raises:
        ValueError: an impossible dtype, or a checkpoint that is not a plain Llama's. All other problems
            are returned.
    """
    tensors, unreadable, wrappers = _unwrap(weights, directory)
    _require_plain(tensors, directory)
    if dtype is None:
        floats = {tensor.dtype for tensor in tensors.values()} - CODE_DTYPES.keys()
        dtype = widest({FLOAT_DTYPES[name] for name in floats})
    dtype = require_float(dtype)
    if config.num_hidden_layers > max(len(tensors) + len(unreadable), 1):
        # an absurd number, before memory is allocated for it
        raise ValueError(
            f"{directory}: found {len(tensors)} tensors, expected some for each of "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    abstract = abstract_model(model_class, config, dtype)
    table = name_table(abstract)
    prefix = decoder_prefix(table)
    embedding = f"{prefix}embed_tokens.weight"
    tensors = _with_prefix(tensors, prefix)
    tied_copy = None
    if config.tie_word_embeddings and LM_HEAD in tensors and LM_HEAD not in table:
        tied_copy = tensors.pop(LM_HEAD)
        if embedding not in tensors:
            # some writers store the one tensor under the head's name
            tensors[embedding], tied_copy = tied_copy, None
    task_head = [name for name in table if name.startswith(TASK_HEADS)]
    if task_head or not prefix:
        # any Llama's decoder can be read, whatever head is stored with it
        heads = (LM_HEAD, *TASK_HEADS)
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if name in table or not name.startswith(heads)
        }
    coded = next(filter(is_code, tensors), None)
    if coded is not None and coded not in table:
        raise ValueError(
            f"{directory}: found quantized weights ({coded}), expected unquantized ones: use the original "
            "checkpoint, or llama_jax.dequantize(model).save_pretrained(NEW_DIR)"
        )
    missing_head = [name for name in task_head if name not in tensors and name not in unreadable]
    problems = [
        *weights.problems,
        *compare_shapes(
            {name: tensor.shape for name, tensor in tensors.items()},
            table,
            abstract,
            may_be_absent=unreadable | set(missing_head),
        ),
        *_compare_code_dtypes(tensors, table, abstract),
    ]
    if len(problems) > 1 and (some := partial_prefix(tensors, table)):
        problems.insert(0, f"some names begin with {some!r} and others do not")
    if tied_copy is not None and not problems:
        problems += _compare_tied(tied_copy, tensors[embedding], rows)
    return CheckpointMatch(
        dtype, abstract, table, tensors, embedding, tied_copy, missing_head, problems, wrappers
    )


def abstract_model(
    model_class: Callable[..., Model], config: LlamaConfig, dtype: DTypeLike
) -> Model:
    """The model's shapes and dtypes, without memory for its parameters."""
    return nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0), dtype=dtype))


def compare_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    table: Mapping[str, ParamSlice],
    abstract: nnx.Module,
    may_be_absent: Iterable[str] = (),
) -> list[str]:
    """Tensors that are missing, unexpected or of another shape than in the model."""
    params, present = flat_params(abstract), {*shapes, *may_be_absent}
    problems = [f"{name}: missing" for name in table if name not in present]
    for name, shape in shapes.items():
        if name not in table:
            problems.append(f"{name}: unexpected")
            continue
        param = params[table[name].path].shape
        expected = tuple(param if table[name].layer is None else param[1:])
        if shape != expected:
            problems.append(f"{name}: found shape {list(shape)}, expected {list(expected)}")
    return problems


def _unwrap(
    weights: StoredWeights, directory: Path
) -> tuple[dict[str, StoredTensor], set[str], str]:
    """Tensors and unreadable names as the bare model has them, and what was removed from the names."""
    unwrapped = unwrap_names([*weights.tensors, *weights.unreadable])
    removed = [name.wrappers for name in unwrapped.values() if name.wrappers]
    wrappers = ", ".join(dict.fromkeys(removed))
    tensors: dict[str, StoredTensor] = {}
    for stored_name, tensor in weights.tensors.items():
        name = unwrapped[stored_name].name
        if name in tensors:
            raise ValueError(
                f"{directory}: {name} is stored twice, with and without {wrappers} in its name"
            )
        tensors[name] = tensor
    return tensors, {unwrapped[name].name for name in weights.unreadable}, wrappers


def _require_plain(tensors: Iterable[str], directory: Path) -> None:
    if lora := next(filter(LOW_RANK.search, tensors), None):
        raise ValueError(
            f"{directory}: contains the tensors of a PEFT adapter ({lora}); merge them into the model "
            "with peft: merge_and_unload(), then save_pretrained"
        )


def _with_prefix(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The decoder's tensors renamed for a class that puts `prefix` before them, if none has it yet."""
    matches = {name: DECODER_NAME.match(name) for name in tensors}
    if any(match and match["prefix"] == prefix for match in matches.values()):
        return dict(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        match = matches[name]
        new_name = name if match is None else prefix + name.removeprefix(match["prefix"])
        renamed[new_name] = tensor
    return renamed


def _compare_code_dtypes(
    tensors: Mapping[str, StoredTensor], table: Mapping[str, ParamSlice], abstract: nnx.Module
) -> list[str]:
    params, problems = flat_params(abstract), []
    for name in filter(is_code, tensors.keys() & table.keys()):
        dtype, expected = CODE_DTYPES[tensors[name].dtype], params[table[name].path].dtype
        if dtype != expected:
            problems.append(f"{name}: found dtype {dtype}, expected {expected}")
    return problems


def _compare_tied(head: StoredTensor, embedding: StoredTensor, rows: ReadRows) -> list[str]:
    """A stored copy of a tied head must equal the embedding.

    Values are compared as stored, so that every reader comes to the same result.
    """
    same = head.shape == embedding.shape
    if same:
        step = max(1, _COMPARED_BYTES // max(head.shape[-1] * 8, 1))
        same = all(
            same_values(rows(head, start, start + step), rows(embedding, start, start + step))
            for start in range(0, head.shape[0], step)
        )
    return [] if same else [OTHER_HEAD]


def same_values(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays, perhaps of two dtypes, hold the same numbers."""
    wide = widest({one.dtype, other.dtype})
    return bool((one.astype(wide, copy=False) == other.astype(wide, copy=False)).all())
