"""`replacing` only replaces files, and `copy_file` also links."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from llama_jax.files.staging import copy_file, replacing, write_text


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


def test_a_copied_file_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    source, target, link = (tmp_path / name for name in ("source", "target", "link"))
    source.write_text("new")
    target.write_text("of another model")
    link.symlink_to(target)
    copy_file(source, link)
    assert link.read_text() == "new"
    assert not link.is_symlink()
    assert target.read_text() == "of another model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "source", "target"]


def test_a_failed_copy_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copy_file(tmp_path / "absent", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "folder", "nothing/x", "file/x"])
def test_errors_name_the_final_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    path = tmp_path / name
    with pytest.raises(OSError) as caught, replacing(path) as staged:
        staged.write_text("new")
    assert caught.value.filename == str(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
