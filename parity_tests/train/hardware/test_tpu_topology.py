"""Slices of TPUs by name: which exist, where they wrap around, and what libtpu makes of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from parity_tests.harness.child_process import ROOT, output_lines
from train.hardware.tpu_topology import Slices, parse_tpu_topology, wraparound

MODULE = "train.hardware.compiled_topologies"


@pytest.mark.parametrize(
    ("text", "slices"),
    [
        ("v5p:4x4x4", Slices(1, "v5p", (4, 4, 4))),
        ("V5E:2x4", Slices(1, "v5e", (2, 4))),
        ("2xv5p:8x8x8", Slices(2, "v5p", (8, 8, 8))),
        ("4xv6e:16x16", Slices(4, "v6e", (16, 16))),
        ("v4:4x8x8_twisted", Slices(1, "v4", (4, 8, 8), twisted=True)),
        ("v5p:16x16x24", Slices(1, "v5p", (16, 16, 24))),
        ("v5p:2x2x1", Slices(1, "v5p", (2, 2, 1))),
    ],
)
def test_names(text: str, slices: Slices) -> None:
    assert parse_tpu_topology(text) == slices


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v9:4x4", "TPUs (v4, v5p, v5e, v6e) such as v5p:4x4x4, v6e:16x16 or 2xv5p:4x4x4, two"),
        ("v5p", "TPUs (v4, v5p, v5e, v6e)"),
        ("v5p-128", "TPUs (v4, v5p, v5e, v6e)"),
        ("0xv5p:4x4x4", "at least one slice"),
        ("v5p:6x4x4", "three lengths that are multiples of 4, or 1, 2 or 4 each, and at most 6144 chips"),
        ("v5p:0x4x4", "three lengths"),
        ("v5p:16x16", "three lengths"),
        ("v5p:2x2x8", "three lengths"),
        ("v5p:16x24x24", "three lengths"),
        ("v4:16x16x20", "three lengths that are multiples of 4, or 1, 2 or 4 each, and at most 4096"),
        ("v5e:32x32", "one of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v6e:4x4x4", "one of 1x1"),
        ("v6e:16x16_twisted", "one of 1x1"),
        ("v5p:4x4x4_twisted", "n x n x 2n or n x 2n x 2n"),  # libtpu aborts the process
        ("v5p:2x2x4_twisted", "n x n x 2n or n x 2n x 2n"),
    ],
)  # fmt: skip
def test_a_slice_that_does_not_exist(text: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_tpu_topology(text)
    message = str(caught.value)
    assert message.startswith(f"topology: found {text!r}, expected {expected}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("generation", "shape", "wraps"),
    [
        ("v5p", (2, 2, 1), "..."),
        ("v5p", (2, 4, 4), "..."),
        ("v5p", (4, 4, 4), "xyz"),
        ("v4", (4, 4, 12), "xyz"),
        ("v5e", (4, 4), ".."),
        ("v5e", (8, 16), ".y"),
        ("v6e", (16, 16), "xy"),
        ("v6e", (8, 8), ".."),
    ],
)
def test_wraparound(generation: str, shape: tuple[int, ...], wraps: str) -> None:
    """As Google Cloud joins them, and as AI-Hypercomputer/maxtext lists its types of accelerators."""
    assert wraparound(generation, shape) == tuple(letter != "." for letter in wraps)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiles for TPUs, which needs libtpu: pip install '.[plan]'",
)


@needs_libtpu
def test_compiled() -> None:
    """One device for each chip, slices told apart; a torus is gathered over by all-gather."""
    rows = dict(map(json.loads, output_lines(MODULE, "all")))
    assert rows["v4:2x2x2"] == [8, "TPU v4", 1, {}]
    assert rows["v5e:1x1"] == [1, "TPU v5 lite", 1, {}]
    assert rows["2xv6e:2x4"] == [16, "TPU v6 lite", 2, {}]
    array = 64 * 64 * 4096 * 2
    # without wraparound links: an all-reduce of the zero-padded array
    assert rows["v5p:4x4x4"] == [64, "TPU v5", 1, {"all-gather": [1, array]}]


@needs_libtpu
def test_processes_compile_at_the_same_time() -> None:
    """libtpu locks a file for the one process that may use the machine's TPUs; here there are none."""
    command = (sys.executable, "-m", f"parity_tests.{MODULE}", "one")
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]  # fmt: skip
    ends = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * 3, ends
