"""Code that is kept for the next start: whole, this user's own, and not too much of it."""

import pytest

from llama_jax.files import kept_code
from llama_jax.files.kept_code import read_code, write_code

CODE = {"one": b"code", "other": b"more"}


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "new" / "code"
    assert read_code(file) is None
    write_code(file, CODE)
    assert read_code(file) == CODE
    assert list(file.parent.iterdir()) == [file]
    assert file.parent.stat().st_mode & 0o077 == 0


def test_old_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_code, "_MOST_FILES", 2)
    folder = tmp_path / "new"
    for name in "abc":
        write_code(folder / name, CODE)
    assert sorted(folder.iterdir()) == [folder / "b", folder / "c"]


@pytest.mark.parametrize("damage", ["bits", "end", "empty", "folder"])
def test_damaged_code_is_not_read(tmp_path, damage):
    """Nor is code that another user could have written."""
    file = tmp_path / "new" / "code"
    write_code(file, CODE)
    content = file.read_bytes()
    if damage == "folder":
        file.parent.chmod(0o777)
    else:
        changed = {
            "bits": content[:-1] + bytes([content[-1] ^ 1]),
            "end": content[:-1],
            "empty": b"",
        }
        file.write_bytes(changed[damage])
    assert read_code(file) is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        write_code(tmp_path / "file" / "code", CODE)
