"""Files that are read and written past the page cache."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.files import direct
from llama_jax.files.direct import DirectWriter, aligned_bytes, can_read_directly
from llama_jax.files.page import PAGE


def fail_unless_buffered(call: Callable[..., int]) -> Callable[..., int]:
    """As a system that takes the flag and then refuses every access."""
    import fcntl

    def access(descriptor: int, *arguments: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(descriptor, *arguments)

    return access


def a_few_at_a_time(call: Callable[..., int]) -> Callable[..., int]:
    """As a system that moves less than it was asked to."""
    return lambda descriptor, buffers, position: call(descriptor, [buffers[0][:PAGE]], position)


SYSTEMS = ["direct", "without", "refusing", "in parts"]


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind = str(request.param)
    change = {"refusing": fail_unless_buffered, "in parts": a_few_at_a_time}.get(kind)
    for name in ("pwritev", "preadv") if change is not None else ():
        monkeypatch.setattr(os, name, change(getattr(os, name)))
    if kind == "without":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    return kind


@pytest.mark.parametrize(
    "sizes",
    [(), (1,), (PAGE,), (100, 2 * PAGE, PAGE), (2 * PAGE, 5, 2 * PAGE + 1, 2**22, PAGE, 3)],
    ids=str,
)
def test_a_file_has_the_bytes_that_were_written(
    tmp_path: Path, system: str, sizes: tuple[int, ...]
) -> None:
    expected, rng = b"", np.random.default_rng(0)
    with DirectWriter(tmp_path / "file") as file:
        for size in sizes:
            for values in (aligned_bytes(size), aligned_bytes(size + 1)[1:]):
                values[...] = rng.integers(0, 256, size)
                assert file.write(values.data) == size
                expected += values.tobytes()
        file.seek(len(expected) + 5)
        file.write(b"after a gap")
        file.seek(0)
        file.write(expected[:1])
        expected += bytes(5) + b"after a gap"
    assert (tmp_path / "file").read_bytes() == expected


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"), DirectWriter(Path("/dev/full")) as file:
        file.write(aligned_bytes(2**22).data)


def test_what_can_be_read_directly_is_found_out(tmp_path: Path, system: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1" * 5000)
    if system in ("without", "refusing"):
        assert not can_read_directly(file)
    elif can_read_directly(file):
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        values = aligned_bytes(PAGE)
        direct.read_all(descriptor, values, 0)
        os.close(descriptor)
        assert values.tobytes() == b"1" * PAGE
    assert not can_read_directly(tmp_path / "missing")
