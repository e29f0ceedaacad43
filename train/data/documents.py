"""Read documents from plain text, JSON Lines and Parquet files, one at a time.

The file name, in any case, decides the format: `.parquet`; `.jsonl` or `.json` with one JSON object per
line; anything else is plain text. All but Parquet may be compressed: `.gz`, `.zst`. For what counts as a
line see `llama_jax.text.lines`.
"""

import glob
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from llama_jax.text.lines import byte_lines, not_utf8
from train.options import require_local

# Characters beyond which a text file is cut, at the end of a line, into several documents: more than almost
# any book has, and few enough to hold in memory and to tokenize at once.
LONGEST_TEXT = 1 << 23

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# the files of a directory that are taken as data
_IN_DIRECTORIES = re.compile(r"(\.(txt|jsonl)(\.gz|\.zst)?|\.parquet)$", re.IGNORECASE)


def source_files(source: str | Path) -> list[Path]:
    """The sorted files of a source: a file, a directory (searched recursively) or a glob (`**` too).

    Of a directory the .txt, .jsonl and .parquet files are taken, compressed or not, except hidden ones and
    those in hidden folders. A file named directly or by a glob is taken whatever its name.

    Raises:
        ValueError: there is no such file.
    """
    require_local("text", source)
    path = Path(source)
    if path.is_dir():
        names = path.rglob("*")
        files = [p for p in names if _IN_DIRECTORIES.search(p.name) and not _hidden(p, path)]
    elif path.exists():
        files = [path]
    else:
        files = [Path(name) for name in glob.glob(str(source), recursive=True)]
    files = sorted(file for file in files if file.is_file())
    if not files:
        problem = "has no .txt, .jsonl or .parquet files" if path.is_dir() else "no such file"
        raise ValueError(f"{source}: {problem}")
    return files


def read_documents(
    sources: Iterable[str | Path],
    *,
    text_field: str = "text",
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[str]:
    """The documents of the sources in order, the files of each sorted. No file is read into memory at once.

    A text file is one document (or several, if it is longer than LONGEST_TEXT); each JSON line and each
    Parquet row is one. Text is passed on unchanged, line ends included, except for a byte order mark.
    Empty documents and blank JSON lines are skipped.

    Args:
        text_field: the field of a JSON line, or the column of a Parquet file.
        advance: called with the number of bytes read since the last call.

    Raises:
        ValueError: naming the file, and the line if there is one: no file, no document in a source, not
            UTF-8, not JSON, no such field or no text in it, a damaged archive or Parquet file.
    """
    for source in sources:
        empty = True
        for path in source_files(source):
            done = 0
            with path.open("rb") as file:
                for text in _read(path, file, text_field):
                    if text:
                        empty = False
                        advance(file.tell() - done)
                        done = file.tell()
                        yield text
            advance(path.stat().st_size - done)
        if empty:
            raise ValueError(f"{source}: contains no text")


def _hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


def _read(path: Path, file: IO[bytes], field: str) -> Iterator[str]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    suffix = (Path(path.stem).suffix if compression else path.suffix).lower()
    if suffix == ".parquet":
        yield from _read_parquet(path, field)
        return
    # pyarrow reads both formats and, unlike zstandard, notices a truncated archive
    stream = (
        io.BufferedReader(pa.input_stream(file, compression=compression)) if compression else file
    )
    try:
        if suffix in (".jsonl", ".json"):
            yield from _read_lines(path, stream, field)
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


def _read_lines(path: Path, stream: IO[bytes], field: str) -> Iterator[str]:
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
            raise ValueError(f"{where}: found {type(record).__name__}, expected an object")
        if field not in record:
            fields = ", ".join(record) or "none"
            raise ValueError(f"{where}: found fields {fields}, expected {field!r} (--text-field)")
        text = record[field]
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: found {type(text).__name__} as {field!r}, expected a string"
            )
        try:
            text.encode()  # JSON can spell lone surrogates, which are not text
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: not Unicode text ({error.reason})") from None
        yield text


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise ValueError(
                    f"{path}: found columns {', '.join(schema.names)}, expected {field!r} (--text-field)"
                )
            dtype = schema.field(field).type
            if not (pa.types.is_string(dtype) or pa.types.is_large_string(dtype)):
                raise ValueError(f"{path}: found {dtype} as column {field!r}, expected string")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise ValueError(
                            f"{path}, row {row}: found null as {field!r}, expected a string"
                        )
                    yield text
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(str(path), error)) from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())  # Arrow's may have several lines
        raise ValueError(f"{path}: not a valid Parquet file ({reason})") from None
