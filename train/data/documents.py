"""Documents out of plain text, JSON Lines and Parquet files, one at a time.

The format is told by the name, in capitals or not: `.parquet`; `.jsonl` or `.json`, a JSON object a line;
anything else is plain text. All but Parquet may be compressed: `.gz`, `.zst`. What a line is,
`llama_jax.text.lines` says.
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

# A text file longer than this many characters becomes several documents, cut at ends of lines: longer than
# almost any book, short enough to hold and to tokenize whole.
LONGEST_TEXT = 1 << 23

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# A directory may hold anything; these are taken for data.
_IN_DIRECTORIES = re.compile(r"(\.(txt|jsonl)(\.gz|\.zst)?|\.parquet)$", re.IGNORECASE)


def source_files(source: str | Path) -> list[Path]:
    """The files of a source, sorted: a file, a directory (searched below, too) or a glob (`**` as well).

    Of a directory the .txt, .jsonl and .parquet files are taken, compressed or not, and none that is
    hidden or in a hidden folder of it; a file named by itself or by a glob is taken whatever its name.

    Raises:
        ValueError: no file.
    """
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
        kind = (
            "a .txt, .jsonl or .parquet file in it"
            if path.is_dir()
            else "a file or a glob of files"
        )
        raise ValueError(f"{source}: found nothing, expected {kind}")
    return files


def read_documents(
    sources: Iterable[str | Path],
    *,
    text_field: str = "text",
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[str]:
    """The documents of the sources, in their order, the files of each sorted; never a file as a whole.

    A text file is one document (several, where it is longer than LONGEST_TEXT), a JSON line and a row of
    Parquet are one each. Text is given as it is, line ends too; only a byte order mark is dropped. Empty
    documents and blank JSON lines are skipped.

    Args:
        text_field: the field of a JSON line, the column of Parquet.
        advance: called with how many more bytes of the files have been read.

    Raises:
        ValueError: naming the file, and the line where there is one: no file, no document in a source,
            not UTF-8, not JSON, no such field or not text in it, a damaged archive or Parquet file.
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
            raise ValueError(f"{source}: found no text, expected at least one document")


def _hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


def _read(path: Path, file: IO[bytes], field: str) -> Iterator[str]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    suffix = (Path(path.stem).suffix if compression else path.suffix).lower()
    if suffix == ".parquet":
        yield from _read_parquet(path, field)
        return
    # pyarrow reads both formats and, unlike zstandard, sees where an archive was cut short
    stream = (
        io.BufferedReader(pa.input_stream(file, compression=compression)) if compression else file
    )
    try:
        if suffix in (".jsonl", ".json"):
            yield from _read_lines(path, stream, field)
        else:
            yield from _read_text(path, stream)
    except OSError as error:
        raise ValueError(f"{path}: found damaged data ({error}), expected {compression}") from None


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
            raise ValueError(f"{where}: found no JSON ({error}), expected an object") from None
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
            text.encode()  # JSON can spell halves of surrogate pairs, which are no text
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: found {error.reason}, expected Unicode text") from None
        yield text


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise ValueError(
                    f"{path}: found columns {', '.join(schema.names)}, expected {field!r} (--text-field)"
                )
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"{path}: found {kind} as column {field!r}, expected string")
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
        raise ValueError(f"{path}: found damaged data ({reason}), expected Parquet") from None
