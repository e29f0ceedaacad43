"""Temporary files for what memory cannot hold."""

import os
from pathlib import Path

import numpy as np
import pytest

from llama_jax.files.direct import aligned_bytes
from llama_jax.files.page import PAGE
from llama_jax.files.scratch import scratch_file, scratch_in


def test_what_was_written_is_read_back_and_leaves_nothing(tmp_path: Path) -> None:
    values = aligned_bytes(3 * PAGE)
    values[...] = np.arange(3 * PAGE) % 251
    with scratch_in(tmp_path, 2**20):
        file = scratch_file(2**20)
        assert file is not None
        file.write(values, PAGE)
        assert os.listdir(tmp_path) == []  # a process that is killed leaves none
        again = aligned_bytes(2 * PAGE)
        file.read(again, 2 * PAGE)
        np.testing.assert_array_equal(again, values[PAGE:])
        descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        del file
        if descriptors:
            assert len(os.listdir("/proc/self/fd")) == descriptors - 1


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    with scratch_in(tmp_path, 2**20):
        file = scratch_file(PAGE)
        assert file is not None
        with pytest.raises(OSError, match="Input/output error"):
            file.read(aligned_bytes(PAGE), 0)


def test_there_is_none_without_a_place_for_it(tmp_path: Path) -> None:
    assert scratch_file(1) is None
    with scratch_in(tmp_path, 100):
        assert scratch_file(101) is None
        with scratch_in(tmp_path, 200):
            assert scratch_file(101) is not None
        assert scratch_file(101) is None
    assert scratch_file(1) is None
