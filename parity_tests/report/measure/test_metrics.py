"""Errors and tolerances of the report, on numbers whose errors are known."""

import numpy as np
import pytest
import torch

from parity_tests.report.measure.errors import compare, errors
from parity_tests.report.measure.metrics import (
    Comparison,
    Errors,
    by_layer_group,
    first_to_drift,
    position_of_drift,
)

EPS = 2.0**-23


def constant(rms: float) -> Errors:
    return Errors(rms, rms, rms, rms, np.full(4, rms, np.float32))


def comparison(name: str, ours: float, theirs: float) -> Comparison:
    return Comparison(name, constant(ours), constant(theirs), EPS)


def test_errors_of_known_rows() -> None:
    reference = torch.tensor([[3.0, -3.0, 3.0, 3.0], [1e6, 1e6, 1e6, 1e6]], dtype=torch.float64)
    values = reference + torch.tensor([[0.0, 0.0, 0.0, 6e-3], [0.0, 0.0, 0.0, 0.0]])
    error = errors(values, reference, EPS, rows=2)
    assert error.by_position == pytest.approx([1e-3, 0.0])
    assert error.rms == pytest.approx(1e-3 / 2**0.5)
    assert error.max == pytest.approx(2e-3)
    assert error.max_ulps == pytest.approx(6e-3 / (2 * EPS))  # numbers near 3 are 2 EPS apart


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    reference = torch.from_numpy(rng.normal(size=(37, 5)))
    values = reference + 1e-6 * torch.from_numpy(rng.normal(size=(37, 5)))
    at_once = errors(values, reference, EPS, 37)
    monkeypatch.setattr("parity_tests.report.measure.errors._BLOCK", 20)
    for in_blocks, expected in zip(errors(values, reference, EPS, 37), at_once, strict=True):
        np.testing.assert_allclose(np.asarray(in_blocks), np.asarray(expected), rtol=1e-12)


def test_a_huge_row_does_not_decide() -> None:
    """One token with an activation of a million, slightly wrong, hides no error of the others."""
    reference = torch.ones(100, 8, dtype=torch.float64)
    reference[0] *= 1e6
    theirs, ours = reference + 1e-7, reference + 1e-5
    theirs[0] = ours[0] = reference[0] + 1.0
    assert compare("x", ours, theirs, reference, eps=EPS, rows=100).drifted


def test_nan_has_drifted() -> None:
    reference = torch.ones(2, 2, dtype=torch.float64)
    wrong = reference.clone()
    wrong[1, 1] = torch.nan
    assert compare("x", wrong, reference, reference, eps=EPS, rows=2).drifted


def test_zeros_have_no_error_and_anything_else_drifts_from_them() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    assert not compare("x", zeros, zeros, zeros, eps=EPS, rows=2).drifted
    assert compare("x", zeros + 1e-30, zeros, zeros, eps=EPS, rows=2).drifted


def test_one_correct_rounding_is_no_drift() -> None:
    assert not comparison("x", 0.49 * EPS, 0.0).drifted
    assert comparison("x", 0.51 * EPS, 0.0).drifted


def test_chance_in_one_layer_is_no_drift() -> None:
    equal = [comparison(f"layers.{n}.mlp", 1e-6, 1e-6) for n in range(9)]
    unlucky = [*equal, comparison("layers.9.mlp", 1.5e-6, 1e-6)]
    assert first_to_drift(unlucky) is None
    broken = [*equal, comparison("layers.9.mlp", 1e-3, 1e-6), comparison("norm", 1e-3, 1e-6)]
    assert first_to_drift(broken) == "layers.9.mlp"
    assert [group.name for group in by_layer_group(broken)] == ["layers.*.mlp", "norm"]


def test_position_of_drift() -> None:
    reference = torch.ones(64, 8, dtype=torch.float64)
    theirs, ours = reference + 1e-6, reference + 1e-6
    assert position_of_drift(compare("x", ours, theirs, reference, eps=EPS, rows=64)) is None
    ours[40:] += 1e-3
    assert position_of_drift(compare("x", ours, theirs, reference, eps=EPS, rows=64)) == 40
