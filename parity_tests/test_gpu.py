"""Kernels, loss, training and generation on an NVIDIA GPU: `python -m pytest -m gpu`, or `make gpu`.

Every process that computes there is a child of this one, which stays on the CPU. Elsewhere the tests are
skipped, but the same program runs with small shapes on the CPU.
"""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from parity_tests.harness.child_process import output_lines
from parity_tests.harness.nvidia import CUDA, device_kind
from parity_tests.reference.errors import relative_error, rms_error
from parity_tests.reference.tolerances import ROUNDING_RATIO

CPU = {"JAX_PLATFORMS": "cpu"}
EPSILON = float(np.finfo(np.float32).eps)


@cache
def numbers(platform: str, part: str, small: bool, process: int = 0) -> Any:
    """A part of `workers.device_numbers`, computed once for all tests."""
    env = CPU if platform == "cpu" else CUDA
    flags = ["--small"] if small else []
    return json.loads(output_lines("workers.device_numbers", part, *flags, env=env)[-1])[part]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def platform(request: pytest.FixtureRequest) -> str:
    if request.param == "gpu" and device_kind() is None:
        pytest.skip("no NVIDIA GPU")
    return request.param


def both(platform: str, part: str) -> tuple[Any, Any]:
    """A part on the platform, and the same on the CPU."""
    small = platform == "cpu"
    return numbers(platform, part, small), numbers("cpu", part, small)


def test_kernels_round_like_the_formula(platform: str) -> None:
    """Output and three gradients against float64: at most 1.25 times the formula's error."""
    errors = numbers(platform, "attention", small=platform == "cpu")
    kernels = {name.split()[0] for name in errors}
    assert kernels == ({"triton", "cudnn"} if platform == "gpu" else {"triton"})
    for name, case in errors.items():
        for kernel, formula in zip(case["kernel"], case["formula"], strict=True):
            assert kernel <= ROUNDING_RATIO * formula + 4 * EPSILON, name


def test_the_fused_loss_rounds_as_on_a_cpu(platform: str) -> None:
    """Loss and both gradients against float64, and against the loss that holds the logits."""
    here, cpu = both(platform, "loss")
    for dtype, case in here.items():
        errors = zip(case["fused"], case["plain"], cpu[dtype]["fused"], strict=True)
        for fused, plain, fused_on_cpu in errors:
            assert fused <= ROUNDING_RATIO * max(plain, fused_on_cpu) + 4 * EPSILON, dtype


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-3)])
def test_training_is_that_of_a_cpu(platform: str, dtype: str, tolerance: float) -> None:
    here, cpu = both(platform, "training")
    for name in ("loss", "norm"):
        assert here[dtype][name] == pytest.approx(cpu[dtype][name], rel=tolerance)
    assert here[dtype]["loss"][-1] < here[dtype]["loss"][0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_process_trains_bit_for_bit_the_same(platform: str, dtype: str) -> None:
    small = platform == "cpu"
    once, again = (numbers(platform, "training", small, process) for process in range(2))
    assert once[dtype] == again[dtype]


@pytest.mark.slow
def test_generation_is_that_of_a_cpu(platform: str) -> None:
    """Prefill and greedy tokens in float32; in bfloat16 the prefill rounds no more than on a CPU."""
    here, cpu = both(platform, "generation")
    exact = cpu["float32"]["logits"]
    assert relative_error(here["float32"]["logits"], exact) <= 1e-4
    assert here["float32"]["tokens"] == cpu["float32"]["tokens"]
    rounded, rounded_on_cpu = (rms_error(of["bfloat16"]["logits"], exact) for of in (here, cpu))
    assert rounded <= ROUNDING_RATIO * rounded_on_cpu
