"""The Triton kernels compile for Ampere, Hopper and Blackwell; needs the compiler of `make plan-gpu`."""

import itertools
import json
import tempfile
from functools import cache

import pytest

from parity_tests.harness.child_process import output_lines
from train.hardware.gpu_compiler import COMPILER_FOLDER
from train.hardware.gpus import GPUS

NAMES = {"attention_forward", "attention_d_query", "attention_d_key_value"}
SIZES = itertools.product(
    ("a100", "h100", "b200", "b300"), ("32", "64", "96", "128", "256"), ("bfloat16", "float16")
)
KERNELS = tuple(map("-".join, SIZES))
STEPS = ("h100-model-dots", "h100-model-full")
PREFILL = "h100-model-prefill"
USUAL = ("a100-128-bfloat16", "h100-128-bfloat16", "h100-model-dots")
REST = tuple(case for case in (*KERNELS, *STEPS, PREFILL) if case not in USUAL)

pytestmark = pytest.mark.skipif(
    not COMPILER_FOLDER.is_dir(), reason="the compiler for NVIDIA GPUs is not installed"
)


@cache
def compiled(cases):
    with tempfile.TemporaryDirectory() as dump:
        rows = map(json.loads, output_lines("workers.gpu_attention", dump, *cases))
        return {row["case"]: row["kernels"] for row in rows}


def kernels_of(case):
    """What the worker says of a case; the usual ones share a process, and so do the rest."""
    return compiled(USUAL if case in USUAL else REST)[case]


def slow_but_usual(cases):
    return [case if case in USUAL else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", slow_but_usual(KERNELS))
def test_kernels_spill_no_registers_and_fit_in_shared_memory(case):
    kernels = kernels_of(case)
    assert kernels.keys() == NAMES
    limit = GPUS[case.partition("-")[0]].shared_memory_of_block
    for kernel in kernels.values():
        assert kernel["spilled"] == 0
        assert kernel["registers"] <= 255
        assert 0 < kernel["shared"] <= limit


@pytest.mark.parametrize("case", slow_but_usual(STEPS))
def test_a_packed_training_step_calls_them(case):
    """By default; the forward kernel again in the backward pass only if remat asks for it."""
    forward = 2 if case.endswith("full") else 1
    assert kernels_of(case) == dict.fromkeys(NAMES, 1) | {"attention_forward": forward}


@pytest.mark.slow
def test_a_prefill_calls_one():
    assert kernels_of(PREFILL) == {"attention_forward": 1}
