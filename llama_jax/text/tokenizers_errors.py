"""Errors of huggingface/tokenizers: bare exceptions and Rust panics."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def is_of_tokenizers(error: BaseException) -> bool:
    """Whether the library raised it: it raises bare `Exception`, and a panic is a `BaseException`."""
    return type(error) is Exception or type(error).__module__ == "pyo3_runtime"


@contextmanager
def tokenizers_errors() -> Iterator[None]:
    """Within, whatever the library raises becomes a ValueError.

    Rust reports a panic on stderr, with a backtrace if RUST_BACKTRACE is set; that output is discarded.
    """
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    except BaseException as error:
        if not is_of_tokenizers(error):
            raise
        raise ValueError(str(error) or type(error).__name__) from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)
