"""The Triton kernels compile for Ampere, Hopper and Blackwell; needs the compiler of `make plan-gpu`."""

import itertools
import json

import pytest

from parity_tests.harness.child_process import output_lines
from train.hardware.gpu_topology import COMPILER_FOLDER
from train.hardware.gpus import GPUS

NAMES = {"attention_forward", "attention_d_query", "attention_d_key_value"}
# the others are slow
USUAL = ["a100-128-bfloat16", "h100-128-bfloat16", "b200-64-bfloat16"]
MODELS = {"h100-model-dots": 1, "h100-model-full": 2}
REST = [
    case
    for case in map("-".join, itertools.product(
        ("a100", "h100", "b200"), ("32", "64", "96", "128", "256"), ("bfloat16", "float16")
    ))
    if case not in USUAL
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    not COMPILER_FOLDER.is_dir(), reason="the compiler for NVIDIA GPUs is not installed"
)


def compiled(directory, cases):
    lines = output_lines("workers.gpu_attention", str(directory), *cases)
    return {row["case"]: row["kernels"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("dump"), [*USUAL, *MODELS])


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("dump"), REST)


def require_resources(case, kernels):
    assert kernels.keys() == NAMES
    limit = GPUS[case.partition("-")[0]].shared_memory_of_block
    for kernel in kernels.values():
        assert kernel["spilled"] == 0
        assert kernel["registers"] <= 255
        assert 0 < kernel["shared"] <= limit


@pytest.mark.parametrize("case", USUAL)
def test_kernels_spill_no_registers_and_fit_in_shared_memory(usual, case):
    require_resources(case, usual[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", REST)
def test_those_of_other_sizes_do_too(rest, case):
    require_resources(case, rest[case])


@pytest.mark.parametrize("case", MODELS)
def test_a_packed_training_step_calls_them(usual, case):
    """By default; the forward kernel again in the backward pass only if remat asks for it."""
    backward = {"attention_d_query": 1, "attention_d_key_value": 1}
    assert usual[case] == {"attention_forward": MODELS[case], **backward}
