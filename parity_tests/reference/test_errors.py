"""The error measures that every comparison uses."""

from collections.abc import Callable

import numpy as np
import pytest

from parity_tests.reference.errors import relative_error, rms_error, worst


def test_relative_error_is_of_the_largest_deviation() -> None:
    assert relative_error([1.0, 2.5, 4.0], [1.0, 2.0, 4.0]) == 0.125


def test_rms_error_is_pooled_over_arrays() -> None:
    assert rms_error([[3.0], [4.0]], [[0.0], [5.0]]) == pytest.approx(np.sqrt(10.0 / 25.0))


@pytest.mark.parametrize("error", [relative_error, lambda a, b: rms_error([a], [b])])
def test_what_is_zero_must_be_zero(error: Callable[..., float]) -> None:
    assert error(np.zeros(3), np.zeros(3)) == 0.0
    assert error(np.full(3, 1e-30), np.zeros(3)) == np.inf


def test_nan_is_within_no_tolerance() -> None:
    assert not relative_error([np.nan, 1.0], [1.0, 1.0]) <= 1e300
    assert not worst({"a": [np.nan], "b": [2.0]}, {"a": [1.0], "b": [1.0]})[0] <= 1e300


def test_worst_names_the_worst() -> None:
    assert worst({"a": [1.0], "b": [3.0]}, {"a": [1.0], "b": [2.0]}) == (0.5, "b")


def test_a_shape_or_a_name_that_differs_is_an_error() -> None:
    with pytest.raises(ValueError, match="shape"):
        relative_error(np.ones((2, 1)), np.ones(2))
    with pytest.raises(ValueError, match="names differ"):
        worst({"a": [1.0]}, {"b": [1.0]})
