"""Arrow files with a column of ids, as `Dataset.save_to_disk` of Hugging Face's datasets writes them.

Each row is a document. The column is a list of integers; its values lie in the file one after the other,
and are memory-mapped there. Files are in Arrow's stream format, as those of datasets, or in its file
format. Those of a saved data set count if its state.json lists them.

Other programs keep a loss mask in a second column, with a value for each id: "labels", with IGNORE_INDEX
for tokens that are not in the loss, or "assistant_masks", "completion_mask" or "loss_mask", with 0. A token
is in the loss if all of these columns that there are say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.files.json_object import read_json_object
from llama_jax.loss import IGNORE_INDEX
from train.data.formats.files import list_files
from train.data.tokens import Ends, Tokens, Vocabulary, join_shards
from train.options import TokenOptions

if TYPE_CHECKING:
    import pyarrow as pa  # runs look for files of all formats, and few have these

_STATE = "state.json"

# columns with a value for each id, and the value of those that are not in the loss
_MASKS = {"labels": IGNORE_INDEX, "assistant_masks": 0, "completion_mask": 0, "loss_mask": 0}


def find_files(path: Path) -> list[Path]:
    """The .arrow files; in a folder with a state.json those that it lists."""
    return [file for file in list_files(path, r"\.arrow$") if is_listed(file)]


def companions(file: Path) -> list[Path]:
    """The file alone."""
    return [file]


def open_files(files: Sequence[Path], vocabulary: Vocabulary, options: TokenOptions) -> Tokens:
    """Memory-map the files.

    Raises:
        ValueError: a file that is damaged, without the column, or whose column is no list of integers.
    """
    for folder in {file.parent for file in files}:
        if missing := sorted(
            name for name in _listed(folder) or () if not (folder / name).exists()
        ):
            raise ValueError(f"{folder / missing[0]}: no such file, but {_STATE} lists it")
    names, shards, ends, masks = [], [], [], []
    masked = {name for file in files for name in _MASKS if name in open_table(file).column_names}
    for file in files:
        columns = [read_column(file, name).chunks for name in (options.column, *sorted(masked))]
        for number, (chunk, *mask_chunks) in enumerate(zip(*columns, strict=True)):
            ids, offsets = _values_of(file, options.column, chunk)
            values = {}
            for name, mask in zip(sorted(masked), mask_chunks, strict=True):
                values[name], mask_offsets = _values_of(file, name, mask)
                if not np.array_equal(offsets - offsets[0], mask_offsets - mask_offsets[0]):
                    raise ValueError(
                        f"{file}: the rows of column {name!r} have other lengths than {options.column!r}"
                    )
            if len(ids):
                names.append(f"{file}, batch {number}")
                shards.append(ids)
                ends.append(_ends_of(offsets))
                masks.append(_Mask(values))
    if not shards:
        raise ValueError(f"{files[0]}: found no ids in column {options.column!r}")
    joined = join_shards(names, shards, ends)
    return replace(joined, in_loss=tuple(masks)) if masked else joined


@dataclass(frozen=True)
class _Mask:
    """Which ids are in the loss, by all columns that say so; an array when a part is read."""

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return min(map(len, self.columns.values()))

    def __getitem__(self, part: slice, /) -> np.ndarray:
        parts = [values[part] != _MASKS[name] for name, values in self.columns.items()]
        return np.logical_and.reduce(parts)


def is_listed(file: Path) -> bool:
    """Whether a file counts: False for one in a saved data set whose state.json does not list it."""
    names = _listed(file.parent) if file.suffix == ".arrow" else None
    return names is None or file.name in names


def open_table(file: Path) -> pa.Table:
    """The table in a file, memory-mapped. Raises ValueError if it is not one of Arrow's."""
    import pyarrow as pa

    try:
        source = pa.memory_map(str(file))
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not a valid Arrow file ({reason})") from None


def read_column(file: Path, column: str) -> pa.ChunkedArray:
    """A column of lists of integers."""
    import pyarrow as pa

    table = open_table(file)
    if column not in table.column_names:
        columns = ", ".join(table.column_names) or "none"
        if "text" in table.column_names or "messages" in table.column_names:
            remedy = "tokenize it first, `python -m train tokenize`"
        else:
            remedy = "name that of the ids with --tokens.column"
        raise ValueError(f"{file}: found columns {columns}, expected {column!r}: {remedy}")
    kind = table.schema.field(column).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (lists or pa.types.is_fixed_size_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"{file}: found {kind} as column {column!r}, expected lists of integers")
    return table.column(column)


def _values_of(file: Path, column: str, rows: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The integers in all rows of a record batch, and the offsets of the rows, from any number on."""
    import pyarrow as pa

    values = rows.flatten()
    if rows.null_count or values.null_count:
        raise ValueError(f"{file}: found null in column {column!r}, expected lists of integers")
    ids = values.to_numpy(zero_copy_only=True)
    if pa.types.is_fixed_size_list(rows.type):
        offsets = np.arange(len(rows) + 1) * rows.type.list_size
    else:
        offsets = rows.offsets.to_numpy(zero_copy_only=True)
    return ids, offsets


def _ends_of(offsets: np.ndarray) -> Ends:
    """Where rows end, from their offsets."""

    def ends(start: int, stop: int) -> np.ndarray:
        # of the dtype of the offsets, or numpy converts all of them
        bounds = np.asarray([start, stop], offsets.dtype) + offsets[0]
        first, last = np.searchsorted(offsets, bounds, side="right")
        return np.asarray(offsets[first:last], np.int64) - int(offsets[0])

    return ends


def _listed(folder: Path) -> set[str] | None:
    """The names of files in a saved data set; None if the folder is not one."""
    if not (folder / _STATE).is_file():
        return None
    entries = read_json_object(folder / _STATE).get("_data_files")
    if not isinstance(entries, list):
        return None
    return {str(entry.get("filename")) for entry in entries if isinstance(entry, dict)}
