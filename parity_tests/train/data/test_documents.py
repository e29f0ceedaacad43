"""Reading documents from files, and the error messages for files that cannot be read."""

from __future__ import annotations

import json
import re
import string
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import documents
from train.data.documents import read_documents, source_files


def write(path: Path, data: str | bytes) -> Path:
    """Write a file, compressed if its name says so."""
    data = data.encode() if isinstance(data, str) else data
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.output_stream(str(path), compression=compression) as file:
        file.write(data)
    return path


def error_of(*sources: Path, field: str = "text") -> str:
    with pytest.raises(ValueError) as caught:
        list(read_documents(sources, text_field=field))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.type is ValueError  # not a subclass: UnicodeDecodeError, ArrowInvalid
    return message


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_unchanged(ending: str, tmp_path: Path) -> None:
    text = "zwei\r\nZeilen\rund\n\n𐍈nicode ﬁ\0 \u2028 end"
    path = write(tmp_path / f"a.txt{ending}", text)
    assert list(read_documents([path])) == [text]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines(ending: str, tmp_path: Path) -> None:
    texts = ["a\nb", "", "ü𐍈", "line\u2028separator", "\r\n"]
    lines = [json.dumps({"n": 1, "body": text}, ensure_ascii=False) for text in texts]
    data = "\r\n".join([*lines[:2], "", "  ", *lines[2:]])  # blank lines, none at the end
    path = write(tmp_path / f"a.jsonl{ending}", data)
    assert list(read_documents([path], text_field="body")) == [text for text in texts if text]


def test_concatenated_archives(tmp_path: Path) -> None:
    for ending in (".gz", ".zst"):
        path = write(tmp_path / f"a.txt{ending}", "one ")
        second = write(tmp_path / f"b.txt{ending}", "two")
        path.write_bytes(path.read_bytes() + second.read_bytes())
        assert list(read_documents([path])) == ["one two"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(kind: pa.DataType, tmp_path: Path) -> None:
    texts = [f"text {n}" if n % 3 else "" for n in range(3000)]
    table = pa.table({"n": list(range(3000)), "text": pa.array(texts, kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert list(read_documents([tmp_path / "a.parquet"])) == [text for text in texts if text]


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    write(tmp_path / "a.jsonl", mark + b'{"text": "json"}\n')
    write(tmp_path / "b.txt", mark + b"plain")
    write(tmp_path / "c.ndjson", mark + b'{"text": "lines"}\n')
    assert list(read_documents([tmp_path])) == ["json", "plain", "lines"]


def test_files_of_directories_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt.zst", "a/y.txt", ".hidden.txt", "c.md", "c.json"):
        write(tmp_path / name, name)
    assert list(read_documents([tmp_path])) == ["a/y.txt", "a/z.txt.zst", "b.txt"]
    assert list(read_documents([tmp_path / "**" / "*.txt"])) == ["a/y.txt", "b.txt"]
    assert list(read_documents([tmp_path / "c.md", tmp_path / "b.txt"])) == ["c.md", "b.txt"]
    (tmp_path / "[x].txt").write_text("named like a glob")
    assert source_files(tmp_path / "[x].txt") == [tmp_path / "[x].txt"]


def test_file_extensions_in_any_case(tmp_path: Path) -> None:
    write(tmp_path / "A.TXT", "plain")
    write(tmp_path / "B.Jsonl", '{"text": "json"}')
    for name, data in (("c.txt.gz", "archive"), ("d.jsonl.zst", '{"text": "lines"}')):
        write(tmp_path / name, data).rename(tmp_path / name.upper())
    pq.write_table(pa.table({"text": ["table"]}), tmp_path / "E.Parquet")
    expected = ["plain", "json", "archive", "lines", "table"]
    assert list(read_documents([tmp_path])) == expected
    assert list(read_documents(sorted(tmp_path.iterdir()))) == expected


def test_hidden_folders_are_not_searched(tmp_path: Path) -> None:
    source = tmp_path / ".cache" / "corpus"  # a hidden directory, but named by the user
    for name in ("a.txt", ".git/b.txt", "x/.svn/y/c.txt", "x/d.txt", ".e.txt"):
        write(source / name, name)
    assert list(read_documents([source])) == ["a.txt", "x/d.txt"]
    assert list(read_documents([source / ".git"])) == [".git/b.txt"]
    with pytest.raises(ValueError, match="/only: has no "):
        source_files(write(tmp_path / "only" / ".git" / "x.txt", "x").parents[1])


@given(
    lines=st.lists(st.text(string.ascii_letters + "\r\nü𐍈", max_size=30)),
    longest=st.integers(1, 20),
)
def test_a_long_text_is_cut_at_ends_of_lines(
    lines: list[str], longest: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "start" + "\n".join(lines)
    path = tmp_path_factory.mktemp("long") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LONGEST_TEXT", longest)
        pieces = list(read_documents([path]))
    assert "".join(pieces) == text
    assert all(len(piece) <= 2 * longest for piece in pieces)
    for piece in pieces[:-1]:
        assert len(piece) == 2 * longest or piece.endswith(("\n", "\r"))


def test_progress_adds_up_to_the_files(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text" * 1000)
    write(tmp_path / "b.jsonl.zst", '{"text": "x"}\n' * 5000)
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "c.parquet")
    counts: list[int] = []
    list(read_documents([tmp_path], advance=counts.append))
    assert sum(counts) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert min(counts) >= 0


def test_large_files_are_not_held_in_memory(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path = write(tmp_path / "a.jsonl.zst", line * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in read_documents([path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 1 << 20  # of 20 MB


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"", ": contains no text"),
        ("a.txt.gz", b"", ": contains no text"),
        ("a.jsonl", b'\n{"text": ""}\n', ": contains no text"),
        ("a.txt", b"abc\xff", ": found the byte 0xff, expected UTF-8"),
        ("a.txt", b"abc\xc3", ": found the byte 0xc3, expected UTF-8"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xe4"}',
            ", line 2: found the byte 0xe4, expected UTF-8",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": "b"',
            ", line 3: not valid JSON (Expecting ',' delimiter: line 1 column 13 (char 12))",
        ),
        ("a.jsonl.zst", b"[1]", ", line 1: found list, expected an object on each line"),
        ("a.json", b'"text"', ", line 1: found str, expected an object on each line"),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}',
            ", line 1: found fields body, id, expected 'text' (--text-field)",
        ),
        ("a.jsonl", b"{}", ", line 1: found fields none, expected 'text' (--text-field)"),
        ("a.jsonl", b'{"text": null}', ", line 1: found NoneType as 'text', expected a string"),
        ("a.jsonl", b'{"text": 3}', ", line 1: found int as 'text', expected a string"),
        (
            "a.jsonl",
            b'{"text": "\\ud800"}',
            ", line 1: not Unicode text (surrogates not allowed)",
        ),
    ],
)
def test_errors_in_files(name: str, data: bytes, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, data)
    assert error_of(path) == f"{path}{expected}"


def test_deeply_nested_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ' + "[" * 100_000)
    assert error_of(path).startswith(f"{path}, line 1: not valid JSON (maximum recursion depth")


@pytest.mark.parametrize(("ending", "kind"), [(".gz", "gzip"), (".zst", "zstd")])
def test_damaged_archives(ending: str, kind: str, tmp_path: Path) -> None:
    text = "".join(f"{n * n}" for n in range(100_000))
    intact = write(tmp_path / f"a.txt{ending}", text).read_bytes()
    pattern = re.escape(f"{tmp_path}/a.txt{ending}") + rf": damaged {kind} data \(.+\)"
    for damaged in (intact[: len(intact) // 2], intact[:-1], b"no archive", intact + b"tail"):
        (tmp_path / f"a.txt{ending}").write_bytes(damaged)
        assert re.fullmatch(pattern, error_of(tmp_path / f"a.txt{ending}"))


def test_damaged_parquet_and_wrong_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"body": ["a"] * 5000, "n": [1] * 5000, "text": ["a", None] * 2500}
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    assert error_of(path, field="x") == (
        f"{path}: found columns body, n, text, expected 'x' (--text-field)"
    )
    assert error_of(path, field="n") == f"{path}: found int64 as column 'n', expected string"
    assert error_of(path) == f"{path}, row 2: found null as 'text', expected a string"
    intact = path.read_bytes()
    for damaged in (
        b"",
        b"PAR1",
        intact[: len(intact) // 2],
        intact[:4] + b"\xff" * 200 + intact[204:],
    ):
        path.write_bytes(damaged)
        assert error_of(path, field="body").startswith(f"{path}: not a valid Parquet file (")


def test_no_file(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none") == f"{tmp_path}/none: no such file"
    assert error_of(tmp_path / "*.txt") == f"{tmp_path}/*.txt: no such file"
    write(tmp_path / "a.md", "text")
    assert (
        error_of(tmp_path) == f"{tmp_path}: has no .txt, .jsonl, .ndjson, .parquet or .arrow files"
    )
