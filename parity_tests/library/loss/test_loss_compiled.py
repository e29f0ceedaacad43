"""The fused loss as XLA compiles it for an H100 and for TPUs, neither of which is here."""

import importlib.util
import json
import re

import pytest

from parity_tests.harness.child_process import output_lines
from train.hardware.chips import GIB
from train.hardware.gpu_compiler import COMPILER_FOLDER

TOKENS, HIDDEN, VOCAB = 32768, 2560, 128256
CHUNK = 2048

needs_gpu_compiler = pytest.mark.skipif(
    not COMPILER_FOLDER.is_dir(), reason="compiles for NVIDIA GPUs: make plan-gpu"
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs: pip install '.[plan]'"
)


def compiled(topology):
    sizes = map(str, (TOKENS, HIDDEN, VOCAB))
    return json.loads(output_lines("workers.compiled_loss", topology, *sizes)[-1])


@pytest.fixture(scope="module")
def h100():
    return compiled("h100:1")


@needs_gpu_compiler
def test_three_matmuls_in_5_gib_on_an_h100(h100):
    """Arguments and gradients are 1.5 GiB of it, the kernel's float32 gradient 1.2."""
    assert h100["units"] == pytest.approx(3, rel=0.01)
    assert h100["peak"] <= 5 * GIB


@needs_gpu_compiler
def test_the_kernels_gradient_is_added_up_in_its_matmul(h100):
    """One read and one write a chunk: no copy, transpose, conversion or addition apart."""
    sums = f"f32[{VOCAB},{HIDDEN}]"
    made = [(operation, operands) for type_, operation, operands in arrays(h100) if type_ == sums]
    assert [operation in ("fusion", "custom-call") for operation, _ in made] == [True]
    ((_, operands),) = made
    matmul = {f"bf16[{CHUNK},{VOCAB}]", f"bf16[{CHUNK},{HIDDEN}]", sums}
    assert matmul <= set(operands)
    assert f"bf16[{VOCAB},{HIDDEN}]" not in [type_ for type_, _, _ in arrays(h100)]


@needs_gpu_compiler
def test_logits_are_read_three_times(h100):
    """By the statistics, by the labels' logits, which are few, and by the gradient."""
    logits, gradient = f"f32[{CHUNK},{VOCAB}]", f"bf16[{CHUNK},{VOCAB}]"
    made = [type_ for type_, _, _ in arrays(h100)]
    assert (made.count(logits), made.count(gradient)) == (1, 1)
    readers = [type_ for type_, _, operands in arrays(h100) if logits in operands]
    assert len(readers) == 3
    assert any(
        re.fullmatch(rf"\(f32\[{CHUNK},\d+\], f32\[{CHUNK},\d+\]\)", type_) for type_ in readers
    )
    assert gradient in readers


@needs_gpu_compiler
def test_eight_gpus_scatter_the_kernels_gradient():
    """Gathered once, scattered once, in float32, without transposing it."""
    result = compiled("h100:8")
    large = [(type_, name) for type_, name in result["collectives"] if str(VOCAB) in type_]
    assert [name for _, name in large] == ["all-gather", "reduce-scatter"]
    assert f"f32[{HIDDEN},{VOCAB}]" in large[1][0]
    assert f"f32[{VOCAB},{HIDDEN}]" not in result["types"]


@needs_libtpu
def test_a_tpu_keeps_the_sum_in_float32():
    result = compiled("v5p:2x2x2")
    assert result["units"] == pytest.approx(3, rel=0.01)
    types = [type_ for type_, _, _ in arrays(result)]
    assert types.count(f"f32[{HIDDEN},{VOCAB}]") == 1
    assert f"bf16[{HIDDEN},{VOCAB}]" not in types


def arrays(result):
    """The instructions of the loop that make arrays, without layouts."""

    def plain(type_):
        return re.sub(r"\{[^}]*\}", "", type_)

    return [
        (plain(type_), operation, list(map(plain, operands)))
        for type_, operation, operands in result["loop"]
        if operation not in ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
    ]
