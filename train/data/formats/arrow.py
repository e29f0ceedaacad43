"""Arrow files with a column of ids, as `Dataset.save_to_disk` of Hugging Face's datasets writes them.

Each row is a document. The column is a list of integers; its values lie in the file one after the other,
and are memory-mapped there. Files are in Arrow's stream format, as those of datasets, or in its file
format. Those of a saved data set count if its state.json lists them.

Other programs keep a loss mask in a second column, with a value for each id: "labels", with IGNORE_INDEX
for tokens that are not in the loss, or "assistant_masks", "completion_mask" or "loss_mask", with 0, as has
"attention_mask" for padding. A token is in the loss if all of these columns that there are say so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.files.json_object import read_json_object
from llama_jax.loss import IGNORE_INDEX
from train.data.formats.files import list_files
from train.data.formats.masks import LABELS, MASKS, PADDING
from train.data.tokens import Ends, Tokens, Vocabulary, join_shards
from train.options import TokenOptions

if TYPE_CHECKING:
    import pyarrow as pa  # runs look for files of all formats, and few have these

_STATE = "state.json"
# in a folder of datasets' cache, and the files there that hold what `map` and `filter` made of the others
_INFO, _CACHED = "dataset_info.json", re.compile(r"(cache-|tmp).*\.arrow$")


def find_files(path: Path) -> list[Path]:
    """The .arrow files; in a folder with a state.json those that it lists.

    In a folder of datasets' cache, those that are not derived from others.
    """
    return [file for file in list_files(path, r"\.arrow$") if is_listed(file, path)]


def companions(file: Path) -> list[Path]:
    """The file alone."""
    return [file]


def open_files(files: Sequence[Path], vocabulary: Vocabulary, options: TokenOptions) -> Tokens:
    """Memory-map the files.

    Raises:
        ValueError: a file that is damaged, without the column, or whose column is no list of integers; rows
            that are padded on the left; labels that are other ids.
    """
    for folder in {file.parent for file in files}:
        if missing := sorted(
            name for name in _listed(folder) or () if not (folder / name).exists()
        ):
            raise ValueError(f"{folder / missing[0]}: no such file, but {_STATE} lists it")
    names, shards, ends, masks = [], [], [], []
    masked = {name for file in files for name in _mask_columns(file)}
    for file in files:
        columns = [read_column(file, name).chunks for name in (options.column, *sorted(masked))]
        for number, (chunk, *mask_chunks) in enumerate(zip(*columns, strict=True)):
            ids, offsets = _values_of(file, options.column, chunk)
            values: dict[str, np.ndarray] = {}
            for name, mask in zip(sorted(masked), mask_chunks, strict=True):
                values[name], mask_offsets = _values_of(file, name, mask)
                if not np.array_equal(offsets - offsets[0], mask_offsets - mask_offsets[0]):
                    raise ValueError(
                        f"{file}: the rows of column {name!r} have other lengths than {options.column!r}"
                    )
            if number == 0 and LABELS in values:
                _require_same_ids(file, options.column, ids, values[LABELS])
            if PADDING in values:
                _require_padding_last(file, values[PADDING], offsets - offsets[0])
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
        parts = [values[part] != MASKS[name] for name, values in self.columns.items()]
        return np.logical_and.reduce(parts)


def _mask_columns(file: Path) -> list[str]:
    """The columns that say what is in the loss: not an attention mask without a 0."""
    import pyarrow.compute as pc

    table = open_table(file)
    names = [name for name in MASKS if name in table.column_names]
    if PADDING in names:
        chunks = [chunk.flatten() for chunk in table.column(PADDING).chunks if len(chunk)]
        if all(pc.min_max(chunk)["min"].as_py() for chunk in chunks if len(chunk)):
            names.remove(PADDING)
    return names


def _require_same_ids(file: Path, column: str, ids: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError if labels that count are other ids, such as those of the next tokens."""
    (other,) = np.nonzero((labels != IGNORE_INDEX) & (labels != ids))
    if len(other):
        raise ValueError(
            f"{file}: token {other[0]}: found label {labels[other[0]]} for id {ids[other[0]]}, expected "
            f"the ids of {column!r} as {LABELS!r}, not shifted, or {IGNORE_INDEX}"
        )


def _require_padding_last(file: Path, mask: np.ndarray, offsets: np.ndarray) -> None:
    """Raise ValueError if padding comes before a token of its row, which would attend to it."""
    rises = (mask[1:] != 0) & (mask[:-1] == 0)
    inner = offsets[(offsets > 0) & (offsets < len(mask))]
    rises[inner - 1] = False  # from one row to the next
    if rises.any():
        row = int(np.searchsorted(offsets, int(np.argmax(rises)), side="right"))
        raise ValueError(
            f"{file}: row {row} of a batch has padding before tokens ({PADDING!r} is 0), expected it "
            "after them, or none"
        )


def is_listed(file: Path, source: Path) -> bool:
    """Whether a file of a source counts.

    Returns:
        False for a file in a saved data set whose state.json does not list it, and for one in datasets'
        cache that was made of the others there, unless it is the source itself.

    Raises:
        ValueError: a saved data set of which a file of indices selects the rows.
    """
    if file.suffix != ".arrow":
        return True
    names = _listed(file.parent)
    if names is not None:
        return file.name in names
    cached = _CACHED.match(file.name) and (file.parent / _INFO).is_file()
    return not (cached and source.is_dir())


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
    state = read_json_object(folder / _STATE)
    entries = state.get("_data_files")
    if not isinstance(entries, list):
        return None
    # as versions before 2.0 saved a data set that was shuffled or filtered
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(
            f"{folder}: its rows are selected by a file of indices ({_STATE}): load it with datasets, and "
            "save it again after flatten_indices()"
        )
    return {str(entry.get("filename")) for entry in entries if isinstance(entry, dict)}
