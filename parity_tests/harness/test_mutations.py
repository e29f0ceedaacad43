"""The suite can fail, and says where (docs/parity.md, P9).

Under each mutation the float64 error must exceed `FLOAT64_BAR` by orders of magnitude, and the walk must
name the module that was broken. `pytest --mutation NAME` runs any part of the suite under one of them.
"""

import pytest

from parity_tests.harness.cases import BY_NAME, inputs_of, weights_of
from parity_tests.harness.mutations import MUTATIONS, mutate
from parity_tests.library.models.test_model import float64_error
from parity_tests.reference.tolerances import FLOAT64_BAR
from parity_tests.report.walk import drifts, first_drift

# The case that a mutation must show in.
SHOWN_BY = {
    "rope_theta_10000": "theta_500000",
    "rope_scaling_dropped": "rope_llama31",
    "mean_over_all_tokens": "labels_some",
}
# Even the smallest of them, an eps of 1e-6 for 1e-5, changes the numbers by a millionth.
VISIBLE = 1e5 * FLOAT64_BAR


def walk(name: str) -> dict[str, float]:
    case = BY_NAME[name]
    return drifts(case.config, weights_of(case.config), inputs_of(case.inputs, case.config))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_seen_and_named(name: str) -> None:
    case = BY_NAME[SHOWN_BY.get(name, "gqa_2_to_1")]
    with mutate(name):
        error, number = float64_error(case)
        begins = first_drift(walk(case.name), VISIBLE)
    assert not error <= VISIBLE, f"{number}: relative error {error:.2e}"
    assert begins == MUTATIONS[name].begins_at


@pytest.mark.parametrize("name", ["gqa_2_to_1", *sorted(set(SHOWN_BY.values()))])
def test_nothing_drifts_without_a_mutation(name: str) -> None:
    assert first_drift(walk(name), FLOAT64_BAR) is None


def test_a_mutation_ends_with_its_block() -> None:
    case = BY_NAME["gqa_2_to_1"]
    with mutate("norms_swapped"):
        assert not float64_error(case)[0] <= VISIBLE
    assert float64_error(case)[0] <= FLOAT64_BAR
