"""A run needs as much memory however it starts: at random, from weights, from a checkpoint of any mesh."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

from parity_tests.harness.child_process import output_lines
from parity_tests.train.runs import Tiny, environment
from train.program.donation import donatable


@pytest.fixture(scope="module")
def measured(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("measured")
    arguments = (str(tiny.data), str(tiny.config), str(folder))
    env = environment(tiny.cache, 8)
    return json.loads(output_lines("train.run.measured_runs", *arguments, env=env)[-1])


@pytest.mark.parametrize("name", ["resumed", "twice", "after_damage", "weights"])
def test_no_start_needs_more_than_a_fresh_one(measured: dict[str, Any], name: str) -> None:
    """In the first step, which a state that cannot be overwritten would make the peak, and at any time."""
    fresh, other = measured["fresh"], measured[name]
    print(f"{name}: {other['peak']:,} bytes at most, {fresh['peak']:,} fresh")
    assert other["state"] == fresh["state"]
    assert other["first_step"] == fresh["first_step"] == fresh["peak"]
    assert other["peak"] == fresh["peak"]


@pytest.mark.parametrize(
    "name", ["fresh", "resumed", "other_mesh", "twice", "after_damage", "weights"]
)
def test_every_step_overwrites_the_state(measured: dict[str, Any], name: str) -> None:
    result = measured[name]
    assert result["in_place"] == [result["state"]] * 2
    assert result["peak"] == result["first_step"]


def test_a_state_in_host_memory_and_bfloat16_resumes_bit_for_bit(measured: dict[str, Any]) -> None:
    """With residuals in the host's memory as well; the moments take half as much."""
    assert measured["moved_same_bits"]
    assert measured["moved_same_metrics"]
    assert measured["moved"]["state"] == measured["moved_resumed"]["state"]
    assert measured["moved"]["state"] < 0.7 * measured["fresh"]["state"]


def test_stochastic_rounding_does_not_depend_on_the_mesh(measured: dict[str, Any]) -> None:
    assert measured["same_rounding"]


def test_donatable_is_a_copy_that_replaces_the_array() -> None:
    values = np.arange(64, dtype=np.float32)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.make_array_from_callback((64,), sharding, lambda index: values[index])
    pointer = placed.unsafe_buffer_pointer()
    (copy,) = donatable([placed])
    assert placed.is_deleted()
    assert copy.unsafe_buffer_pointer() != pointer
    np.testing.assert_array_equal(copy, values)
