"""The headers of a directory's weight files, and which of its tensors can be read."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoints.names import is_buffer, is_code
from llama_jax.checkpoints.quantized.detect import read_scheme, read_scheme_beside
from llama_jax.checkpoints.quantized.weights import dequantized
from llama_jax.checkpoints.safetensors_read import (
    CODE_DTYPES,
    FLOAT_DTYPES,
    StoredTensor,
    read_array,
    read_header,
    read_slice,
)
from llama_jax.checkpoints.safetensors_write import INDEX_FILE, SINGLE_FILE
from llama_jax.files.foreign_weights import describe
from llama_jax.files.json_object import read_json_object
from llama_jax.formatting import summarize

# what GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8 and MLX store instead of, or beside, a weight
_QUANTIZED_PARTS = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|weight_format|weight\.(absmax|quant_(map|state)\b.*)"
    r"|weight_(scale|scale_inv|scale_2|packed|shape|zero_point))$"
)

ReadRows = Callable[[StoredTensor, int, int], np.ndarray]
"""Reads part of a tensor in its stored dtype: read_rows(tensor, start, stop)."""


class StoredWeights(NamedTuple):
    """The tensors of a checkpoint, before they are compared with a model.

    Attributes:
        tensors: by name.
        problems: what is wrong with the files.
        unreadable: names of tensors in damaged files, which are not to be reported as missing too.
        scheme: how another program quantized the weights, for people; "" if none did.
        notes: what the user should know.
    """

    tensors: dict[str, StoredTensor]
    problems: list[str]
    unreadable: set[str]
    scheme: str = ""
    notes: tuple[str, ...] = ()


def open_weights(
    directory: Path,
    single: str = SINGLE_FILE,
    index: str = INDEX_FILE,
    read_header: Callable[[Path], Iterable[StoredTensor]] = read_header,
    read: Callable[[StoredTensor], np.ndarray] = read_array,
) -> StoredWeights:
    """Read the headers of a directory's weight files.

    Weights that another program quantized, as config.json or its own file says, are a `DequantizedTensor`
    each.

    Args:
        single: name of a file with all tensors.
        index: name of the index of several files.
        read_header: lists the tensors of one file; the default is for safetensors.
        read: the values of one of those.

    Raises:
        ValueError: no such files, the only one cannot be read, or the weights are quantized in a way that
            is not supported.
    """
    fields = read_json_object(directory / "config.json")
    try:
        scheme = read_scheme(fields, directory)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    if (directory / single).exists():
        file_of: dict[str, str] = {}
        files = [single]
    elif (directory / index).exists():
        file_of = read_index(directory / index)
        files = sorted(set(file_of.values()))
    else:
        raise ValueError(
            f"{directory}: expected weights in {single} or {index}; it is {describe(directory)}"
        )
    weights = StoredWeights({}, [], set())
    for file in files:
        try:
            tensors = read_header(directory / file)
        except ValueError as error:
            if not file_of:
                raise ValueError(f"{directory}: {error}") from None
            weights.problems.append(str(error))
            weights.unreadable.update(
                name for name, stored_in in file_of.items() if stored_in == file
            )
            continue
        for tensor in filter(lambda tensor: not is_buffer(tensor.name), tensors):
            if (other := weights.tensors.setdefault(tensor.name, tensor)) is not tensor:
                weights.problems.append(
                    f"{tensor.name}: in {other.path.name} and in {tensor.path.name}"
                )
    if scheme is None and any(name.endswith(".qweight") for name in weights.tensors):
        try:
            scheme = read_scheme_beside(directory)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
    if scheme is not None and not weights.problems:
        logical, problems, notes = dequantized(weights.tensors, scheme, fields, read)
        if problems:
            raise ValueError(summarize(str(directory), problems))
        weights = StoredWeights(logical, [], set(), scheme.title, tuple(notes))
    for name in list(weights.tensors):
        _require_readable(weights, name, directory)
    return weights


def _require_readable(weights: StoredWeights, name: str, directory: Path) -> None:
    """Replace a tensor that cannot be used by the reason."""
    dtype = weights.tensors[name].dtype
    if _QUANTIZED_PARTS.search(name) and not weights.scheme:
        raise ValueError(
            f"{directory}: the weights are quantized by another program ({name}), and config.json does not "
            "say how; use the original, unquantized checkpoint"
        )
    permitted = CODE_DTYPES if is_code(name) else FLOAT_DTYPES
    if dtype not in permitted:
        del weights.tensors[name]
        weights.problems.append(f"{name}: found dtype {dtype}, expected {', '.join(permitted)}")
        weights.unreadable.add(name)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of a file in the same directory.

    Raises:
        ValueError: not an index, or a file outside the directory.
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: no weight_map, which lists the tensors and their files")
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


def read_rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor in a safetensors file, in its stored dtype."""
    stop = min(stop, tensor.shape[0])
    values = np.empty((stop - start, *tensor.shape[1:]), FLOAT_DTYPES[tensor.dtype])
    read_slice(tensor, (slice(start, stop), *(slice(n) for n in tensor.shape[1:])), values)
    return values
