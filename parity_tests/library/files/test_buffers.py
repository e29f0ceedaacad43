"""Memory that is used again."""

import gc
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from llama_jax.files.buffers import empty, reused_buffers
from parity_tests.harness.child_process import ROOT

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = (1024, 1024)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_no_array_refers_to_it() -> None:
    with reused_buffers(2**25):
        first = empty(SHAPE, BFLOAT16)
        assert first.shape == SHAPE
        assert first.dtype == BFLOAT16
        assert first.flags.c_contiguous
        assert first.flags.writeable
        place = address(first)
        del first
        assert address(empty(SHAPE, BFLOAT16)) == place
        assert address(empty((500, 1024), FLOAT32)) == place


def test_smaller_arrays_share_the_place_of_a_large_one() -> None:
    with reused_buffers(2**22):
        place = address(empty((1024, 1024), FLOAT32))  # all of it
        first, second, third = (empty((512, 1024), BFLOAT16) for _ in range(3))
        assert [address(each) - place for each in (first, second, third)] == [0, 2**20, 2**21]
        first[...], second[...], third[...] = 1, 2, 3
        del second
        larger = empty((768, 1024), BFLOAT16)  # fits into no part that is free
        larger[...] = 4
        again = empty((512, 1024), BFLOAT16)
        assert address(again) - place == 2**20
        assert (first == 1).all()
        assert (third == 3).all()


def test_arrays_beyond_the_limit_have_memory_of_their_own() -> None:
    with reused_buffers(2**21):
        first, second = empty(SHAPE, BFLOAT16), empty(SHAPE, FLOAT32)
        first[...], second[...] = 1, 2
        assert (first == 1).all()
        assert (second == 2).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[5:6, 7:8],
        lambda array: array.reshape(-1).view(np.uint8).T,
        lambda array: array.reshape(-1).view(np.uint8).data,
        lambda array: np.lib.stride_tricks.as_strided(array, (2, 2), (4, 4)),
        lambda array: iter(array),
    ],
    ids=["slice", "other dtype", "memoryview", "strided", "iterator"],
)
def test_memory_is_kept_as_long_as_anything_refers_to_it(
    view: Callable[[np.ndarray], object],
) -> None:
    with reused_buffers(2**25):
        array = empty(SHAPE, FLOAT32)
        array[...] = 7
        place, left = address(array), view(array)
        del array
        gc.collect()
        other = empty(SHAPE, FLOAT32)
        assert address(other) != place
        del left, other


def test_threads_never_share_memory() -> None:
    def fill(value: int) -> bool:
        for _ in range(50):
            array = empty((512, 1024), FLOAT32)
            array[...] = value
            if not (array == value).all():
                return False
        return True

    with reused_buffers(2**25), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(4)))


def run_alone(code: str) -> None:
    """In a process of its own, since what the heap does depends on what was in it."""
    imports = """
import numpy as np
from llama_jax.files.buffers import empty, kept_heap, release_unused, reused_buffers
from llama_jax.files.memory import resident_memory

size = 2**26
resident_memory()  # what it keeps from its first call is in the heap before the arrays are
"""
    subprocess.run([sys.executable, "-c", imports + code], cwd=ROOT, check=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_stays_in_a_kept_heap() -> None:
    run_alone("""
with kept_heap():
    array = np.ones(size, np.uint8)
    before = resident_memory()
    del array
    assert resident_memory() > before - size // 2
    # what was measured with may lie in that memory now, so a little less is asked for
    array = np.ones(size - 2**20, np.uint8)
    assert resident_memory() < before + size // 2
    del array
assert resident_memory() < before - size // 2
""")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_unused_memory_is_given_back_where_it_is_too_much() -> None:
    run_alone("""
with kept_heap(), reused_buffers(2 * size):
    used, unused = empty((size,), np.dtype(np.uint8)), empty((size,), np.dtype(np.uint8))
    heap = np.ones(size, np.uint8)
    used[...] = unused[...] = 3
    del unused, heap
    before = resident_memory()
    release_unused(before + size)
    assert resident_memory() > before - size // 2
    release_unused(before - size)
    assert resident_memory() < before - size - size // 2
    assert (used == 3).all()
    assert (empty((size,), np.dtype(np.uint8)) == 0).all()
""")


def test_outside_it_is_numpys_memory() -> None:
    assert empty(SHAPE, FLOAT32).base is None
    with reused_buffers(2**25):
        assert empty((3,), FLOAT32).base is None
        assert empty(SHAPE, FLOAT32).base is not None
    assert empty(SHAPE, FLOAT32).base is None
    assert empty((0, 4), FLOAT32).shape == (0, 4)
