"""Errors and tolerances of the report, on numbers whose errors are known."""

import numpy as np
import pytest
import torch

from parity_tests.report.metrics import (
    Compared,
    Errors,
    compare,
    errors,
    first_to_drift,
    kinds,
    position_of_drift,
)

UNIT = 2.0**-23


def of(rms: float) -> Errors:
    return Errors(rms, rms, rms, rms, np.full(4, rms, np.float32))


def compared(name: str, ours: float, theirs: float) -> Compared:
    return Compared(name, of(ours), of(theirs), UNIT)


def test_errors_of_known_rows() -> None:
    want = torch.tensor([[3.0, -3.0, 3.0, 3.0], [1e6, 1e6, 1e6, 1e6]], dtype=torch.float64)
    got = want + torch.tensor([[0.0, 0.0, 0.0, 6e-3], [0.0, 0.0, 0.0, 0.0]])
    found = errors(got, want, UNIT, rows=2)
    assert found.by_position == pytest.approx([1e-3, 0.0])
    assert found.rms == pytest.approx(1e-3 / 2**0.5)
    assert found.max == pytest.approx(2e-3)
    assert found.max_ulps == pytest.approx(6e-3 / (2 * UNIT))  # a number of 3 has places of 2 UNIT


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    want = torch.from_numpy(rng.normal(size=(37, 5)))
    got = want + 1e-6 * torch.from_numpy(rng.normal(size=(37, 5)))
    whole = errors(got, want, UNIT, 37)
    monkeypatch.setattr("parity_tests.report.metrics._BLOCK", 20)
    for one, other in zip(errors(got, want, UNIT, 37), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_huge_row_does_not_decide() -> None:
    """One token with an activation of a million, a little wrong, hides no fault of the others."""
    want = torch.ones(100, 8, dtype=torch.float64)
    want[0] *= 1e6
    theirs, ours = want + 1e-7, want + 1e-5
    theirs[0] = ours[0] = want[0] + 1.0
    assert compare("x", ours, theirs, want, UNIT, 100).drifted


def test_nan_has_drifted() -> None:
    want = torch.ones(2, 2, dtype=torch.float64)
    wrong = want.clone()
    wrong[1, 1] = torch.nan
    assert compare("x", wrong, want, want, UNIT, 2).drifted


def test_zeros_have_no_error_and_anything_else_drifts_from_them() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    assert not compare("x", zeros, zeros, zeros, UNIT, 2).drifted
    assert compare("x", zeros + 1e-30, zeros, zeros, UNIT, 2).drifted


def test_one_correct_rounding_is_no_drift() -> None:
    assert not compared("x", 0.49 * UNIT, 0.0).drifted
    assert compared("x", 0.51 * UNIT, 0.0).drifted


def test_a_single_layer_may_be_unlucky_a_kind_may_not() -> None:
    equal = [compared(f"layers.{n}.mlp", 1e-6, 1e-6) for n in range(9)]
    unlucky = [*equal, compared("layers.9.mlp", 1.5e-6, 1e-6)]
    assert first_to_drift(unlucky) is None
    broken = [*equal, compared("layers.9.mlp", 1e-3, 1e-6), compared("norm", 1e-3, 1e-6)]
    assert first_to_drift(broken) == "layers.9.mlp"
    assert [kind.name for kind in kinds(broken)] == ["layers.*.mlp", "norm"]


def test_where_in_the_sequence() -> None:
    want = torch.ones(64, 8, dtype=torch.float64)
    theirs, ours = want + 1e-6, want + 1e-6
    assert position_of_drift(compare("x", ours, theirs, want, UNIT, 64)) is None
    ours[40:] += 1e-3
    assert position_of_drift(compare("x", ours, theirs, want, UNIT, 64)) == 40
