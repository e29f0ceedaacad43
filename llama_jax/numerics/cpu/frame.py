"""The frame with which XLA calls a function (xla/ffi/api/c_api.h in jaxlib), as words of 8 bytes."""

from typing import Any

import numpy as np
from numba import carray, njit

from llama_jax.numerics.cpu.machine import pointer

BYTES = 8  # of a word

# Places in XLA's structures, in words.
EXTENSION, API, CONTEXT = 1, 2, 3  # of a frame
ARGUMENT_COUNT, ARGUMENTS, RESULTS, ATTRIBUTES = 7, 9, 14, 20
SCHEDULE, THREADS = 17, 18  # functions of the API
BUFFER_DTYPE, DATA, DIMENSIONS = 2, 3, 5
INT8, UINT8, FLOAT32, BFLOAT16 = 2, 6, 11, 16  # dtypes

_METADATA, _METADATA_VERSION = 1, 3  # kind of extension; version in the metadata
_VERSION = 0 | 3 << 32  # major 0, minor 3
_NO_END = 1 << 40

_compile = njit(error_model="numpy")  # kept as a part of what calls it


@_compile
def words(address: int) -> Any:
    """The words at an address, as an array without an end."""
    # with a size, numba would compile this for each number
    return carray(pointer(address), (_NO_END,), np.int64)


@_compile
def answer_registration(extension: int) -> None:
    """Tell XLA which version of its interface this is."""
    extension_words = words(extension)
    if extension_words[1] & 0xFFFFFFFF == _METADATA:
        metadata = words(extension_words[3])
        metadata[_METADATA_VERSION] = _VERSION


@_compile
def only_attribute(frame: Any) -> int:
    """The value of the only attribute of a call, an int64."""
    scalar = words(words(frame[ATTRIBUTES])[0])
    return words(scalar[1])[0]
