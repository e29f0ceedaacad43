"""What several processes decide together, where each may see something else."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from llama_jax.formatting import first_line

T = TypeVar("T")


class DamagedError(ValueError):
    """Some process could not read what all of them need."""


def gathered(text: str) -> list[str]:
    """The texts of all processes, each of which calls this; in the order of the processes."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(encoded.size, np.int32))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: encoded.size] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def together(read: Callable[[], T], fatal: type[Exception] | tuple[type[Exception], ...] = ()) -> T:
    """What `read` returns, if it succeeds in every process, each of which calls this.

    `read` must not wait for other processes.

    Args:
        fatal: errors that are raised as they are; the others then wait for this process in vain.

    Raises:
        DamagedError: in all processes, if `read` fails in one; with the first line of its error.
    """
    problem = ""
    try:
        result = read()
    except fatal:
        raise
    except Exception as error:  # damage shows as any exception of Orbax or TensorStore
        problem = first_line(error) or type(error).__name__
    problems = gathered(problem)
    if problem:
        raise DamagedError(problem)
    for process, other in enumerate(problems):
        if other:
            raise DamagedError(f"in process {process}: {other}")
    return result
