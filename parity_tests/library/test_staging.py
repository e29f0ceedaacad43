"""`replacing` only replaces files."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from llama_jax.files.staging import replacing, write_text


def write(path: Path) -> None:
    with replacing(path) as staged:
        write_text(staged, "new")


def test_a_pipe_is_written_and_remains(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write(path)
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert stat.S_ISFIFO(path.lstat().st_mode)
    assert [*tmp_path.iterdir()] == [path]


def test_a_pipe_remains_if_its_reader_stops_early(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    closes = threading.Timer(0.5, os.close, [reader])
    closes.start()
    with pytest.raises(BrokenPipeError), replacing(path) as staged:
        write_text(staged, "x" * 10**6)  # more than a pipe holds
    assert stat.S_ISFIFO(path.lstat().st_mode)


def test_a_link_remains_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    write(link)
    assert link.is_symlink()
    assert file.read_text() == "new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "there" / "other")
    write(dangling)
    assert (tmp_path / "there" / "other").read_text() == "new"
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["file", "other"]


@pytest.mark.parametrize("name", ["", "folder", "nothing/x", "file/x"])
def test_errors_name_the_final_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    path = tmp_path / name
    with pytest.raises(OSError) as caught, replacing(path) as staged:
        staged.write_text("new")
    assert caught.value.filename == str(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
