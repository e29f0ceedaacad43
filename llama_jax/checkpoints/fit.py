"""A directory's tensors beside the model they are for, and everything that does not match."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.checkpoints.names import (
    _DECODER,
    LM_HEAD,
    LOW_RANK,
    TASK_HEADS,
    Slot,
    decoder_prefix,
    flat_params,
    is_buffer,
    is_code,
    name_table,
    prefix_of_some,
    unwrapped,
)
from llama_jax.checkpoints.safetensors_read import (
    CODE_DTYPES,
    FLOAT_DTYPES,
    StoredTensor,
    read_header,
    read_slice,
)
from llama_jax.checkpoints.safetensors_write import INDEX_FILE, SINGLE_FILE
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import describe
from llama_jax.files.json_object import read_json_object

Model = TypeVar("Model", bound=nnx.Module)

OTHER_HEAD = (
    f"{LM_HEAD}: differs from the embedding although tie_word_embeddings is true; remove the tensor, or "
    "set tie_word_embeddings to false in config.json to use it"
)

_COMPARED_BYTES = 1 << 24

# what GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8 and MLX store in place of, or beside, a weight
_QUANTIZED_PARTS = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|weight_format|weight\.(absmax|quant_(map|state)\b.*)"
    r"|weight_(scale|scale_inv|scale_2|packed|shape|zero_point))$"
)


@dataclass(frozen=True)
class Fit:
    """A directory's tensors beside the model they are for, and everything that does not fit.

    dtype: what the model would have. stored: by the model's names. embedding: its name there. tied: the
    copy of a tied head that some exporters write as well. new: what a task's head has and the directory
    has not. wrappers: what was taken out of the tensors' names, for people; "" where nothing was.
    """

    dtype: np.dtype
    abstract: Any
    table: dict[str, Slot]
    stored: dict[str, StoredTensor]
    embedding: str
    tied: StoredTensor | None
    new: list[str]
    faults: list[str]
    wrappers: str = ""


# reads part of a tensor as it is stored: rows(tensor, start, stop)
Rows = Callable[[StoredTensor, int, int], np.ndarray]


class Weights(NamedTuple):
    """The tensors of a directory's weight files by name, what is wrong with the files, and the names
    that the faulty files would have held (not to be called missing a second time)."""

    stored: dict[str, StoredTensor]
    faults: list[str]
    excused: set[str]


def fit(
    model_class: Callable[..., nnx.Module],
    config: LlamaConfig,
    weights: Weights,
    directory: Path,
    dtype: Any = None,
    rows: Rows | None = None,
) -> Fit:
    """Lay a directory's tensors beside the model of `config`: the check that every reader shares.

    No values are read, but of a tied head that is stored as well.

    Args:
        dtype: of the model; None keeps the stored one (the widest, where several are mixed).
        rows: what reads part of a tensor; None is for safetensors.

    Raises:
        ValueError: an unknown dtype, or more layers than there are tensors. All other faults are returned.
    """
    stored, faults, excused = weights
    shown = unwrapped([*stored, *excused])
    wrappers = ", ".join(dict.fromkeys(filter(None, (each.taken for each in shown.values()))))
    named = {shown[name].name: tensor for name, tensor in stored.items()}
    if len(named) < len(stored):
        names = [shown[name].name for name in stored]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{directory}: {twice} is there with {wrappers} in its name and without")
    stored, excused = named, {shown[name].name for name in excused}
    if lora := next(filter(LOW_RANK.search, stored), None):
        raise ValueError(
            f"{directory}: found the tensors of a PEFT adapter beside the model's ({lora}); merge them "
            "with peft: merge_and_unload(), then save_pretrained"
        )
    if dtype is None:
        floats = {tensor.dtype for tensor in stored.values()} - CODE_DTYPES.keys()
        dtype = widest({FLOAT_DTYPES[name] for name in floats})
    dtype = require_float(dtype)
    if config.num_hidden_layers > max(len(stored) + len(excused), 1):
        # an absurd count, before anything is laid out for it
        raise ValueError(
            f"{directory}: found {len(stored)} tensors, expected some for each of "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    abstract = abstract_model(model_class, config, dtype)
    table = name_table(abstract)
    prefix = decoder_prefix(table)
    stored = _with_prefix(stored, prefix)
    embedding = f"{prefix}embed_tokens.weight"
    tied = stored.pop(LM_HEAD) if _is_tied_copy(stored, table, config) else None
    if tied is not None and embedding not in stored:
        # one tensor under two names: some writers keep the other one
        stored[embedding], tied = tied, None
    task_head = [name for name in table if name.startswith(TASK_HEADS)]
    if task_head or not prefix:
        stored = {
            name: tensor
            for name, tensor in stored.items()
            if name in table or not name.startswith((LM_HEAD, *TASK_HEADS))
        }
    new = [name for name in task_head if name not in stored and name not in excused]
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    coded = next((name for name in stored if is_code(name)), None)
    if coded is not None and coded not in table:
        raise ValueError(
            f"{directory}: found quantised weights ({coded}), expected ordinary ones: take the checkpoint "
            "they were made from, or undo it: quantization.dequantize(model).save_pretrained(NEW_DIR)"
        )
    faults = faults + _compare(shapes, table, abstract, excused | set(new))
    leaves = flat_params(abstract)
    for name in filter(is_code, stored.keys() & table.keys()):
        found, expected = CODE_DTYPES[stored[name].dtype], leaves[table[name].path].dtype
        if found != expected:
            faults.append(f"{name}: found dtype {found}, expected {expected}")
    if len(faults) > 1 and (prefix := prefix_of_some(stored, table)):
        faults.insert(0, f"some names begin with {prefix!r} and others do not")
    if tied is not None and not faults:
        faults += _compare_tied(tied, stored[embedding], rows or read_rows)
    return Fit(dtype, abstract, table, stored, embedding, tied, new, faults, wrappers)


def read_rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor in a safetensors file, in the dtype in which they are stored."""
    stop = min(stop, tensor.shape[0])
    values = np.empty((stop - start, *tensor.shape[1:]), FLOAT_DTYPES[tensor.dtype])
    read_slice(tensor, (slice(start, stop), *(slice(n) for n in tensor.shape[1:])), values)
    return values


def _compare_tied(head: StoredTensor, embedding: StoredTensor, rows: Rows) -> list[str]:
    """Some exporters write the tied head as well: welcome if it is the embedding, a fault if not.

    Values are compared as they are stored, so that every reader decides alike.
    """
    same = head.shape == embedding.shape
    if same:
        step = max(1, _COMPARED_BYTES // max(head.shape[-1] * 8, 1))
        same = all(
            equal(rows(head, start, start + step), rows(embedding, start, start + step))
            for start in range(0, head.shape[0], step)
        )
    return [] if same else [OTHER_HEAD]


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays, perhaps of two dtypes, hold the same numbers."""
    wide = widest({one.dtype, other.dtype})
    return bool((one.astype(wide, copy=False) == other.astype(wide, copy=False)).all())


def _stored_dtypes(name: str) -> Iterable[str]:
    """What a tensor of this name may be stored as: a weight's codes as integers, all else as floats."""
    return CODE_DTYPES if is_code(name) else FLOAT_DTYPES


def asked_dtype(asked: Any) -> Any:
    """Without "auto" and the prefix of torch's names; torch's dtypes by name."""
    if asked is None or (isinstance(asked, str) and asked == "auto"):
        return None
    name = str(asked)
    if name.startswith("torch."):
        return name.removeprefix("torch.")
    try:
        return jnp.dtype(asked)
    except TypeError:
        return asked  # `require_float` names those that there are


def require_float(dtype: Any) -> np.dtype:
    """The dtype of a model's weights. Raises ValueError for one that they cannot have."""
    wanted = {str(known): known for known in FLOAT_DTYPES.values()}
    try:
        found = wanted[str(jnp.dtype(dtype))]
    except (TypeError, KeyError):
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(wanted)}") from None
    if found == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "dtype: found float64, expected jax_enable_x64 to be on, or another dtype asked for"
        )
    return found


def abstract_model(model_class: Callable[..., Model], config: LlamaConfig, dtype: Any) -> Model:
    """The model without memory: shapes and dtypes."""
    return nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0), dtype=dtype))


def open_weights(
    directory: Path,
    single: str = SINGLE_FILE,
    index: str = INDEX_FILE,
    read_header: Callable[[Path], Iterable[StoredTensor]] = read_header,
) -> Weights:
    """The headers of a directory's weight files: of one file, or of several and their index.

    Args:
        read_header: the tensors of one file; safetensors unless another is given.

    Raises:
        ValueError: no such files, or the only one cannot be read.
    """
    if (directory / single).exists():
        listed: dict[str, str] = {}
        files = [single]
    elif (directory / index).exists():
        listed = read_index(directory / index)
        files = sorted(set(listed.values()))
    else:
        raise ValueError(
            f"{directory}: expected weights in {single} or {index}; it is {describe(directory)}"
        )
    stored: dict[str, StoredTensor] = {}
    faults: list[str] = []
    excused: set[str] = set()
    for file in files:
        try:
            tensors = read_header(directory / file)
        except ValueError as error:
            if not listed:
                raise ValueError(f"{directory}: {error}") from None
            faults.append(str(error))
            excused |= {name for name, place in listed.items() if place == file}
            continue
        for tensor in tensors:
            if is_buffer(tensor.name):
                continue
            if _QUANTIZED_PARTS.search(tensor.name):
                raise ValueError(
                    f"{directory}: the weights are quantised by another program ({tensor.name}), which is "
                    "not supported; use the original checkpoint that is not quantised"
                )
            if tensor.name in stored:
                faults.append(f"{tensor.name}: in {stored[tensor.name].path.name} and in {file}")
            elif tensor.dtype not in (allowed := _stored_dtypes(tensor.name)):
                wanted = ", ".join(allowed)
                faults.append(f"{tensor.name}: found dtype {tensor.dtype}, expected {wanted}")
                excused.add(tensor.name)
            else:
                stored[tensor.name] = tensor
    return Weights(stored, faults, excused)


def widest(dtypes: set[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds every value of `dtypes`: float32 for float16 beside bfloat16."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file of the same directory. Raises ValueError for any other place."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: found no weight_map, expected tensor names and their files")
    for name, file in weight_map.items():
        if not _is_file_name(file):
            raise ValueError(
                f"{path}: tensor {name[:200]} is said to be in {repr(file)[:200]}, expected a file of "
                "the directory"
            )
    return weight_map


def _is_file_name(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or len(name) > 255:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return Path(name).name == name


def _with_prefix(stored: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The decoder's tensors renamed for a class whose own have `prefix`, if none of them has it yet."""
    matches = {name: _DECODER.match(name) for name in stored}
    if any(match and match["prefix"] == prefix for match in matches.values()):
        matches = {}
    return {
        prefix + name.removeprefix(match["prefix"])
        if (match := matches.get(name))
        else name: tensor
        for name, tensor in stored.items()
    }


def _is_tied_copy(
    stored: Mapping[str, Any], table: Mapping[str, Slot], config: LlamaConfig
) -> bool:
    return config.tie_word_embeddings and LM_HEAD in stored and LM_HEAD not in table


def _compare(
    shapes: Mapping[str, tuple[int, ...]],
    table: Mapping[str, Slot],
    abstract: nnx.Module,
    excused: set[str],
) -> list[str]:
    leaves = flat_params(abstract)
    faults = [f"{name}: missing" for name in table if name not in shapes and name not in excused]
    for name, found in shapes.items():
        if name not in table:
            faults.append(f"{name}: unexpected")
            continue
        slot = table[name]
        shape = leaves[slot.path].shape
        expected = tuple(shape) if slot.layer is None else tuple(shape[1:])
        if found != expected:
            faults.append(f"{name}: found shape {list(found)}, expected {list(expected)}")
    return faults
