"""Read documents from plain text, JSON Lines, Parquet and Arrow files, one at a time.

The file name, in any case, decides the format: `.parquet`; `.arrow`; `.jsonl`, `.ndjson` or `.json` with
one JSON object per line; anything else is plain text. Text and JSON may be compressed: `.gz`, `.zst`. For
what counts as a line see `llama_jax.text.lines`.
"""

import glob
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from llama_jax.text.lines import byte_lines, not_utf8
from train.data.chat import FIELDS, Chat, parse_chat
from train.data.formats.arrow import is_listed, open_table
from train.data.formats.files import split_of
from train.data.tokens import Split
from train.options import require_local

# Characters beyond which a text file is cut, at the end of a line, into several documents: more than almost
# any book has, and few enough to hold in memory and to tokenize at once.
LONGEST_TEXT = 1 << 23

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# in the folder of a `DatasetDict`, which has a folder for each split
_SPLITS = "dataset_dict.json"
# the files of a data set on the Hub, which begin with the name of their split
_OF_SPLIT = re.compile(
    r"(train|val|valid|validation|dev|eval|test)(?![a-z]).*-\d{5}-of-\d{5}.*\.parquet$"
)

# the files of a directory that are taken as data
_IN_DIRECTORIES = re.compile(
    r"(\.(txt|jsonl|ndjson)(\.gz|\.zst)?|\.parquet|\.arrow)$", re.IGNORECASE
)


def source_files(source: str | Path) -> list[Path]:
    """The sorted files of a source: a file, a directory (searched recursively) or a glob (`**` too).

    Of a directory the .txt, .jsonl, .ndjson, .parquet and .arrow files are taken, compressed or not, except
    hidden ones, those in hidden folders, those of a saved data set that its state.json does not list, and
    the test split of one that was saved or is from the Hub. A file named directly or by a glob is taken
    whatever its name.

    Raises:
        ValueError: there is no such file.
    """
    require_local("text", source)
    path = Path(source)
    if path.is_dir():
        names = path.rglob("*")
        files = [p for p in names if _IN_DIRECTORIES.search(p.name) and not _hidden(p, path)]
        given = _given_splits(path, files)
        files = [file for file in files if given.get(file, "train") is not None]
    elif path.exists():
        files = [path]
    else:
        files = [Path(name) for name in glob.glob(str(source), recursive=True)]
    files = sorted(file for file in files if file.is_file() and is_listed(file, path))
    if not files:
        problem = (
            "has no .txt, .jsonl, .ndjson, .parquet or .arrow files"
            if path.is_dir()
            else "no such file"
        )
        raise ValueError(f"{source}: {problem}")
    return files


def _given_splits(source: Path, files: Sequence[Path]) -> dict[Path, Split | None]:
    """The splits of files, None for tests, in a saved `DatasetDict` or a data set of the Hub."""
    if (source / _SPLITS).is_file():
        return {file: split_of(file.relative_to(source)) for file in files}
    named = [file for file in files if source.is_dir() and _OF_SPLIT.match(file.name)]
    splits = {file: split_of(Path(file.name)) for file in named}
    return splits if "train" in splits.values() else {}


def read_documents(
    sources: Iterable[str | Path],
    *,
    text_field: str = "text",
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[str]:
    """As `read_split_documents`, without the splits."""
    for _, text in read_split_documents(sources, text_field=text_field, advance=advance):
        assert isinstance(text, str)
        yield text


def read_split_documents(
    sources: Iterable[str | Path],
    *,
    text_field: str = "text",
    chat: bool = False,
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[Split | None, str | Chat]]:
    """The documents of the sources in order, the files of each sorted. No file is read into memory at once.

    A text file is one document (or several, if it is longer than LONGEST_TEXT); each JSON line and each row
    of Parquet or Arrow is one. Text is passed on unchanged, line ends included, except for a byte order
    mark. Empty documents and blank JSON lines are skipped.

    Args:
        text_field: the field of a JSON line, or the column of a Parquet or Arrow file.
        chat: the field is a list of messages, each with a role.
        advance: called with the number of bytes read since the last call.

    Returns:
        Each document with its split, where it is of a saved `DatasetDict` of Hugging Face's datasets, or in
        files that are named after splits as on the Hub, such as validation-00000-of-00001.parquet.

    Raises:
        ValueError: naming the file, and the line if there is one: no file, no document in a source, not
            UTF-8, not JSON, no such field or no text in it, a damaged archive or Parquet file.
    """
    for source in sources:
        empty = True
        files = source_files(source)
        given = _given_splits(Path(source), files)
        divided = "validation" in given.values()
        for path in files:
            done = 0
            split = given.get(path) if divided else None
            with path.open("rb") as file:
                for text in _read(path, file, text_field, chat):
                    if text:
                        empty = False
                        advance(file.tell() - done)
                        done = file.tell()
                        yield split, text
            advance(path.stat().st_size - done)
        if empty:
            raise ValueError(f"{source}: contains no text")


def _hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


def _read(path: Path, file: IO[bytes], field: str, chat: bool) -> Iterator[str | Chat]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    suffix = (Path(path.stem).suffix if compression else path.suffix).lower()
    if suffix in (".parquet", ".arrow"):
        yield from _read_table(path, field, chat, _batches_of(path, suffix))
        return
    # pyarrow reads both formats and, unlike zstandard, notices a truncated archive
    stream = (
        io.BufferedReader(pa.input_stream(file, compression=compression)) if compression else file
    )
    try:
        if suffix in (".jsonl", ".ndjson", ".json"):
            yield from _read_lines(path, stream, field, chat)
        elif chat:
            raise ValueError(
                f"{path}: is plain text, expected chats in JSON lines, Parquet or Arrow"
            )
        else:
            yield from _read_text(path, stream)
    except OSError as error:
        raise ValueError(f"{path}: damaged {compression} data ({error})") from None


def _read_text(path: Path, stream: IO[bytes]) -> Iterator[str]:
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            while piece := text.read(LONGEST_TEXT):
                yield piece + text.readline(LONGEST_TEXT)
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(str(path), error)) from None


def _read_lines(path: Path, stream: IO[bytes], field: str, chat: bool) -> Iterator[str | Chat]:
    for number, line in enumerate(byte_lines(stream), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8(where, error)) from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{where}: found {type(record).__name__}, expected an object on each line"
            )
        if field not in record:
            fields = ", ".join(record) or "none"
            raise ValueError(f"{where}: found fields {fields}, expected {field!r} (--text-field)")
        if chat:
            _require_unicode(where, json.dumps(record, ensure_ascii=False))
            yield parse_chat(where, field, record)
            continue
        text = record[field]
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: found {type(text).__name__} as {field!r}, expected a string"
            )
        _require_unicode(where, text)
        yield text


def _require_unicode(where: str, text: str) -> None:
    """Raise ValueError for lone surrogates, which JSON can spell, and are not text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not Unicode text ({error.reason})") from None


Batches = Callable[[list[str]], Iterator[pa.RecordBatch]]


def _read_table(
    path: Path, field: str, chat: bool, table: tuple[pa.Schema, Batches]
) -> Iterator[str | Chat]:
    schema, batches = table
    if field not in schema.names:
        raise ValueError(
            f"{path}: found columns {', '.join(schema.names)}, expected {field!r} (--text-field)"
        )
    dtype = schema.field(field).type
    fields = [field, *(name for name in FIELDS if chat and name in schema.names and name != field)]
    if not chat and not (pa.types.is_string(dtype) or pa.types.is_large_string(dtype)):
        raise ValueError(f"{path}: found {dtype} as column {field!r}, expected string")
    row = 0
    try:
        for batch in batches(fields):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                row += 1
                if chat:
                    record = dict(zip(fields, map(_without_nulls, values), strict=True))
                    yield parse_chat(f"{path}, row {row}", field, record)
                    continue
                (text,) = values
                if text is None:
                    raise ValueError(
                        f"{path}, row {row}: found null as {field!r}, expected a string"
                    )
                yield text
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(str(path), error)) from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_not_valid(path, error)) from None


def _batches_of(path: Path, suffix: str) -> tuple[pa.Schema, Batches]:
    """The schema of a table, and a function that reads columns of it."""
    try:
        if suffix == ".arrow":
            table = open_table(path)
            # a slice of a column that is memory-mapped is no copy
            return table.schema, lambda fields: iter(table.select(fields).to_batches(1024))
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_not_valid(path, error)) from None

    def batches(fields: list[str]) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(batch_size=1024, columns=fields):
                yield batch.select(fields)  # in this order

    return schema, batches


def _without_nulls(value: Any) -> Any:
    """Without the fields that are null: in a table every object has the fields of all others."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [*map(_without_nulls, value)] if isinstance(value, list) else value


def _not_valid(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())  # Arrow's may have several lines
    kind = "Arrow" if path.suffix.lower() == ".arrow" else "Parquet"
    return f"{path}: not a valid {kind} file ({reason})"
