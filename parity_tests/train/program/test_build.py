"""What of a step depends on the devices."""

import jax
import pytest

from parity_tests.train.fake_chips import chips, gpus
from train.program.build import layers_per_iteration


@pytest.mark.parametrize(
    ("requested", "devices", "expected"),
    [
        (None, gpus(1, 1), 16),
        (None, gpus(1, 8), 1),
        (None, chips((1, 1, 1)), 1),
        (None, jax.devices("cpu")[:1], 1),
        (4, gpus(1, 1), 4),
        (4, gpus(1, 8), 4),
        (99, gpus(1, 1), 16),
    ],
    ids=["gpu", "gpus", "tpu", "cpu", "some", "some of gpus", "more than there are"],
)
def test_a_single_gpu_runs_all_layers_in_one_iteration(requested, devices, expected):
    assert layers_per_iteration(requested, 16, devices) == expected
