"""`python -m train plan` for NVIDIA GPUs, and what is in the programs that XLA compiles for them."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_jax.presets import PRESETS
from parity_tests.harness.child_process import ROOT, output_lines
from train.hardware.chips import CHIPS, GIB
from train.hardware.gpu_compiler import COMPILER_FOLDER, PLUGIN
from train.hardware.gpus import GPUS

needs_compiler = pytest.mark.skipif(
    not any(importlib.metadata.distributions(name=PLUGIN, path=[*sys.path, str(COMPILER_FOLDER)])),
    reason="compiles for NVIDIA GPUs, which needs XLA's compiler for them: make plan-gpu",
)
NOT_CUDNN = (
    "cudnn: found padding or segments, expected neither: cuDNN takes them only as a [q, k] bias"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Flags of a small model, with fewer heads of keys than of queries."""
    config = replace(
        PRESETS["tiny-4m"],
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1024,
    )
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    flags = f"--model.preset= --model.config {file} --sequence-length 512 --batch-size 16"
    return flags.split()


def compiled(topology: str, *flags: str) -> dict[str, Any]:
    lines = output_lines("train.plan.compiled_for_gpus", topology, *flags)
    facts: dict[str, Any] = json.loads(lines[-1])
    return facts


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "train", "plan", *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def requires_fused_attention(facts: dict[str, Any]) -> None:
    """Every kernel is called, that of the forward pass also for recomputation; no scores are held."""
    calls = facts["calls"]
    # XLA may take some iterations of a loop out of it
    assert calls["attention_d_query"] >= 1
    assert calls["attention_d_key_value"] >= 1
    assert calls["attention_forward"] >= 2
    # keys and values, with their own number of heads
    assert facts["keys_read"] == [2] * sum(calls.values())
    assert facts["scores"] == []
    assert facts["repeated"] == []


@needs_compiler
def test_attention_in_the_program(small) -> None:
    requires_fused_attention(compiled("h100:2x4", *small))


@pytest.mark.slow
@needs_compiler
def test_llama_8b_on_eight_gpus() -> None:
    """8 x 8192 tokens, fsdp 8, remat full."""
    flags = "--model.preset llama-3.1-8b --batch-size 8 --sequence-length 8192 --model.remat full"
    facts = compiled("h100:8", *flags.split())
    requires_fused_attention(facts)
    assert facts["peak"] <= 20.5 * GIB


@needs_compiler
def test_a_plan(small, tmp_path: Path) -> None:
    """Two hosts: numbers against the data sheet, the network, the reason for the attention; no noise."""
    file = tmp_path / "plan.json"
    done = plan("--topology", "H100:2x4", *small, "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(file.read_text())
    gpu = GPUS["h100"]
    assert result["mesh"] == {"stage": 1, "data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert (result["devices"], result["hosts"], result["device_kind"]) == (8, 2, gpu.name)
    assert (result["attention"], result["attention_reason"]) == ("triton", NOT_CUDNN)
    assert f"attention triton ({NOT_CUDNN})" in done.stdout.replace("\n", " ")
    assert result["compute_dtype"] == "bfloat16"
    memory = result["memory"]
    # 32 bytes of counters and seeds beside them
    assert memory["parameters"] + memory["optimizer_state"] < memory["arguments"] < result["peak"]
    assert result["peak"] <= result["chip"]["memory"] * result["chip"]["memory_fraction"]
    assert result["chip"] == CHIPS[gpu.name]._asdict()
    assert result["fits"] is True
    sends = {collective["kind"]: collective for collective in result["collectives"]}
    gathers = sends["all-gather"]
    # a ring through two hosts of four: a quarter of what a device sends
    assert gathers["between_hosts"] == pytest.approx(gathers["sent"] / 4)
    assert 0 < gathers["asynchronous"] <= gathers["count"]
    assert gathers["exposed"] <= gathers["sent"]
    network = sum(each["between_hosts"] for each in sends.values()) / 50e9
    assert result["roofline"]["links"] == pytest.approx(network)
    for words in ("of which XLA may use 90%", "network", "exposed", "fits"):
        assert words in done.stdout


@pytest.mark.slow
@needs_compiler
def test_what_does_not_fit(small, tmp_path: Path) -> None:
    """XLA compiles it all the same; the peak is more than it may use, if less than there is."""
    file = tmp_path / "plan.json"
    done = plan("--topology", "a100-40gb:1", *small, "--batch-size", "8192", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    memory = GPUS["a100-40gb"].memory
    assert 0.9 * memory < result["peak"] < memory
    assert result["refused"] is None
    assert result["fits"] is False
    assert "does not fit" in done.stdout
    assert "advice: --micro-batches" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--topology h800:8",
            "topology: found 'h800:8', expected TPUs, such as v5p:4x4x4, or GPUs, such as",
        ),
        (
            "--topology h100:0",
            "topology: found 'h100:0', expected a number of GPUs, such as h100:8, or of",
        ),
    ],
)
def test_wrong_topologies(arguments: str, message: str) -> None:
    check_error(plan(*arguments.split()), message)


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "h100:2x3 --mesh.fsdp 4",
            "mesh: found data 1 x fsdp 4 x sequence 1 x tensor 1 = 4, expected 6",
        ),
        (
            "h100:4x2 --mesh.fsdp 2 --mesh.tensor 4",
            "mesh: found data 1 and fsdp 2, expected their product to be divisible by 4 slices (of GPUs: ",
        ),
        ("h100:8 --model.attention cudnn", "padding or segments, expected neither"),
    ],
)
def test_wrong_meshes(arguments: str, message: str) -> None:
    check_error(plan("--topology", *arguments.split()), message)


def check_error(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
