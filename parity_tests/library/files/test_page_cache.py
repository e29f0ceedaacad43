"""Files that do not stay in the page cache."""

import os
from pathlib import Path

import pytest

from llama_jax.files import page_cache


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system does not offer it")
@pytest.mark.parametrize(("share", "times"), [(2**40, 2), (1, 0)], ids=["large", "small"])
def test_only_large_files_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int, times: int
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"\0" * 2**16)
    advised: list[int] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert os.path.samestat(os.fstat(descriptor), file.stat())
        advised.append(advice)

    monkeypatch.setattr(page_cache, "_SHARE", share)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    count = page_cache.forgetting(lambda: [file], 2**16)
    for _ in range(5):
        count(2**27)
    assert advised == [os.POSIX_FADV_DONTNEED] * times


def test_a_file_that_has_gone_is_left_to_whoever_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"\0" * 2**16)
    monkeypatch.setattr(page_cache, "_SHARE", 2**40)
    count = page_cache.forgetting(lambda: [file, tmp_path / "missing"], 2**16)
    file.unlink()
    count(2**28)
