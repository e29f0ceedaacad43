"""Parts of files as one array, without a copy."""

import gc
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_jax.files.mapping import FilePart, can_map, map_parts

PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux")


def written(path: Path, pages: int) -> np.ndarray:
    content = np.random.default_rng(pages).integers(0, 256, pages * PAGE, np.uint8)
    path.write_bytes(content.tobytes())
    return content


def regions(path: Path) -> int:
    """How many mappings of a file this process has."""
    return Path("/proc/self/maps").read_text().count(str(path))


def test_parts_come_one_after_the_other(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    first, second = written(one, 5), written(other, 3)
    parts = [FilePart(one, PAGE, 2 * PAGE), FilePart(other, 0, PAGE), FilePart(one, 0, PAGE)]
    array = map_parts(parts)
    assert array is not None
    expected = [first[PAGE : 3 * PAGE], second[:PAGE], first[:PAGE]]
    np.testing.assert_array_equal(array, np.concatenate(expected))
    # what is written into the array is not in the file, which may be replaced
    array[: 2 * PAGE] = 7
    assert one.read_bytes() == first.tobytes()
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(other)
    np.testing.assert_array_equal(array[2 * PAGE : 3 * PAGE], second[:PAGE])
    assert (array[: 2 * PAGE] == 7).all()


def test_the_mapping_ends_with_the_last_view(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = written(path, 4)
    view = map_parts([FilePart(path, 0, 4 * PAGE)]).view(np.uint16)[5:]
    gc.collect()
    assert regions(path)
    np.testing.assert_array_equal(view, content.view(np.uint16)[5:])
    del view
    gc.collect()
    assert not regions(path)


def test_what_cannot_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert can_map(FilePart(path, 2 * PAGE, PAGE))
    assert not can_map(FilePart(path, 8, PAGE))
    assert not can_map(FilePart(path, PAGE, PAGE + 8))
    assert map_parts([FilePart(Path("/proc/self/status"), 0, PAGE)]) is None
