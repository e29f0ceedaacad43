"""Plain Python numbers from scalars and zero-dimensional arrays of numpy and JAX."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np


def plain_number(value: Any) -> Any:
    """A number as Python int, float or bool; anything else, also a traced array, unchanged."""
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        return value if isinstance(value, jax.core.Tracer) else value.item()
    if isinstance(value, int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def plain_numbers(values: Any) -> Any:
    """`plain_number` of every entry of a list, tuple or one-dimensional array; anything else unchanged."""
    if isinstance(values, np.ndarray | jax.Array) and values.ndim == 1:
        return np.asarray(values).tolist()
    if isinstance(values, list | tuple):
        return type(values)(map(plain_number, values))
    return plain_number(values)


def is_integer(value: Any) -> bool:
    """Whether it is a Python int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a Python int or float and not a bool."""
    return is_integer(value) or isinstance(value, float)


def integers(values: Any) -> tuple[Any, ...]:
    """One or several numbers as a tuple of plain numbers."""
    values = plain_numbers(values)
    return (
        tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)
    )
