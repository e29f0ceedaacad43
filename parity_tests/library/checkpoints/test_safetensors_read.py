"""Tensors that are read past the page cache."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llama_jax.checkpoints import safetensors_read
from llama_jax.checkpoints.safetensors_read import StoredTensor, read_header, read_tensor
from llama_jax.checkpoints.safetensors_write import TensorSpec, write_file
from llama_jax.files import direct
from llama_jax.files.direct import aligned_bytes, reading_directly
from llama_jax.files.page import PAGE

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = (9, PAGE // 2)  # more parts than are read ahead


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Within, parts are of one block; the files of which any were read."""
    files: list[Path] = []
    read_parts = direct.read_parts

    def count(path: Path, position: int, values: np.ndarray) -> Iterator[np.ndarray]:
        files.append(path)
        return read_parts(path, position, values)

    monkeypatch.setattr(direct, "_PART", PAGE)
    monkeypatch.setattr(safetensors_read, "read_parts", count)
    with reading_directly(True):
        yield files


def write(path: Path, *arrays: np.ndarray) -> list[StoredTensor]:
    named = {str(number): array for number, array in enumerate(arrays)}
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in named.items()]
    write_file(path, specs, named.__getitem__, direct=True)
    return read_header(path)


def blocks() -> np.ndarray:
    return aligned_bytes(9 * PAGE).view(BFLOAT16).reshape(SHAPE)


def test_whole_blocks_are_read_so_and_others_as_ever(tmp_path: Path, parts: list[Path]) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(BFLOAT16) for shape in (SHAPE, (3,))]
    first, small = write(tmp_path / "file", *arrays)
    shifted = replace(first, shape=(8, SHAPE[1]), offset=first.offset + 16, nbytes=8 * PAGE)
    out = blocks()
    assert read_tensor(first, out)
    np.testing.assert_array_equal(out, arrays[0])
    assert parts == [tmp_path / "file"]
    for tensor, target, expected in (
        (small, np.empty(3, BFLOAT16), arrays[1]),
        (shifted, blocks()[:8], arrays[0].reshape(-1)[8:][: 8 * SHAPE[1]].reshape(8, -1)),
        (first, np.empty(SHAPE, np.float32), arrays[0].astype(np.float32)),
        (first, aligned_bytes(9 * PAGE + 2)[2:].view(BFLOAT16).reshape(SHAPE), arrays[0]),
    ):
        assert read_tensor(tensor, target)
        np.testing.assert_array_equal(target, expected)
    with reading_directly(False):
        assert read_tensor(first, blocks())
    assert parts == [tmp_path / "file"]


@pytest.mark.parametrize("row", range(SHAPE[0]))
def test_a_value_that_is_not_finite_is_found(tmp_path: Path, parts: list[Path], row: int) -> None:
    array = np.zeros(SHAPE, BFLOAT16)
    array[row, 7] = np.nan
    (tensor,) = write(tmp_path / "file", array)
    assert not read_tensor(tensor, blocks())
    assert parts


@pytest.mark.parametrize("rows", [0, 1, 8])
def test_a_file_that_was_cut_is_an_error(tmp_path: Path, parts: list[Path], rows: int) -> None:
    (tensor,) = write(tmp_path / "file", np.zeros(SHAPE, BFLOAT16))
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(tensor.offset + rows * PAGE + (5 if rows else 0))
    with pytest.raises(ValueError, match="file: ends inside tensor 0: truncated"):
        read_tensor(tensor, blocks())
    assert parts
