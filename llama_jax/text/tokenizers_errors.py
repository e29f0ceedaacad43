"""What huggingface/tokenizers raises for a file that it does not like: bare exceptions, Rust panics."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def is_of_tokenizers(error: BaseException) -> bool:
    """Whether the library raised it: it has no exceptions of its own, and a panic is no Exception."""
    return type(error) is Exception or type(error).__module__ == "pyo3_runtime"


@contextmanager
def tokenizers_errors() -> Iterator[None]:
    """Within, whatever the library raises is a ValueError, and a panic prints nothing.

    Rust tells of a panic on stderr, with a backtrace where RUST_BACKTRACE asks for one.
    """
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if not is_of_tokenizers(error):
            raise
        raise ValueError(str(error) or type(error).__name__) from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
