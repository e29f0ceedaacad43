"""`python -m train plan`: its numbers are the compiler's, its ranking documented, its errors one line."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from llama_jax.attention.splash import splash_kernel
from llama_jax.attention.zigzag import ZigZag
from llama_jax.models.pipeline import Pipeline
from llama_jax.presets import PRESETS
from parity_tests.harness.child_process import ROOT, output_lines
from train.data.batch import Batch
from train.hardware.chips import CHIPS, GIB
from train.hardware.flops import matmul_flops
from train.hardware.roofline import Roofline
from train.options import PLANNED, RunOptions
from train.plan.advice import advice
from train.plan.compiled import Alternative, Plan, kernel_work
from train.plan.tables import show_plan

LINE_OF_128 = 128 * 4  # bytes


@pytest.fixture(scope="module")
def planned():
    return json.loads(output_lines("train.plan.planned")[-1])


def test_collectives_of_small_programs(planned):
    """Count, bytes of the full arrays, bytes sent: psums, a permute, gathers in a loop."""
    assert planned["psum"] == {"all-reduce": [1, LINE_OF_128, 2 * 7 / 8 * LINE_OF_128]}
    assert planned["pairs"] == {"all-reduce": [1, LINE_OF_128, LINE_OF_128]}
    assert planned["ring"] == {"collective-permute": [1, LINE_OF_128, LINE_OF_128]}
    assert planned["loop"] == {"all-gather": [5, 5 * 64 * 4, 7 / 8 * 5 * 64 * 4]}


@pytest.mark.parametrize("name", ["none", "full", "micro"])
def test_memory_is_what_the_compiler_says(planned, name):
    plan = planned["plans"][name]
    memory, stats = plan["memory"], plan["stats"]
    assert memory["arguments"] == stats["argument"]
    assert memory["outputs"] == stats["output"]
    assert memory["aliased"] == stats["alias"]
    assert memory["temporaries"] == stats["temp"]
    assert plan["held"] == [memory["parameters"], memory["optimizer_state"]]
    assert sum(plan["held"]) + plan["batch"] <= memory["arguments"]
    assert plan["fits"] is None  # a CPU has no data sheet
    assert "all-gather" in plan["collectives"]


def test_recomputation_and_micro_batches_save_memory(planned):
    peaks = {name: plan["peak"] for name, plan in planned["plans"].items()}
    assert peaks["full"] < peaks["none"]
    assert peaks["micro"] < peaks["none"]


def test_flops(planned):
    """Counted over shards, they are the formula's plus what plain attention does above the diagonal."""
    plans = planned["plans"]
    plan = plans["none"]
    assert plan["flops"] == 3 * plan["forward"]
    layers, width, seq = 4, 4 * 64, 32
    above = 3 * 4 * layers * width * (seq - (seq + 1) / 2)
    assert plan["attention"] == "plain"
    assert plan["counted"] == pytest.approx(plan["flops"] + above, rel=1e-9)
    assert plans["micro"]["counted"] == pytest.approx(plan["counted"])
    assert 1.2 < plans["full"]["counted"] / plan["counted"] < 4 / 3


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_flops_of_the_slowest_shard(order: str, shards: int) -> None:
    """Of traced kernels: a shard's queries with the keys they see, in blocks, in nine matmuls."""
    length, heads, dim, block = 4096, 4, 64, 512
    zigzag = ZigZag.of(length, shards) if order == "zigzag" else None
    ids: Any = jax.ShapeDtypeStruct((1, 1, length), jnp.int32)
    share, slowest = kernel_work("splash", Batch(ids, ids, ids, ids, zigzag), shards)
    kernel = splash_kernel(length, length, heads, 1, shards, order=zigzag)

    def energy(query, key, value):
        out = jax.vmap(kernel)(query, key, value)
        return out.astype(jnp.float32).sum()

    rows = [jax.ShapeDtypeStruct((1, heads, length, dim), jnp.bfloat16)] * 3
    counted = matmul_flops(jax.make_jaxpr(jax.grad(energy, (0, 1, 2)))(*rows).jaxpr, share, slowest)
    # blocks of queries of the shard that sees most keys, and how many blocks of keys each sees
    blocks = length // block
    seen = range(blocks - blocks // shards, blocks) if zigzag is None else range(blocks)
    mean = sum(block + 1 for block in seen) / len(seen)
    matmuls = 2 + 3 + 4  # forward, of the queries' gradient, of the keys' and values'
    assert slowest == (pytest.approx(2 - 1 / shards, rel=0.1) if zigzag is None else 1)
    expected = 2 * heads * dim * length * mean * block * matmuls
    assert counted == pytest.approx(expected, rel=1e-3)  # the sums of dO * O are in it


def test_the_other_way_to_gather_weights(planned):
    """With micro-batches: gathered once they send less and hold more, by the estimate."""
    plans = planned["plans"]
    assert plans["none"]["alternative"] is None
    gather, peak, sent = plans["micro"]["alternative"]
    assert gather == "step"
    # two weights and a sum in float32 of what tensor 2 leaves, instead of an eighth of a gradient twice
    parameters = plans["micro"]["memory"]["parameters"] * 4
    assert peak - plans["micro"]["peak"] == pytest.approx(parameters * 2.75, rel=0.1)
    assert 0 < sent < plans["micro"]["sent"]


def test_both_ways_to_gather_weights_are_shown() -> None:
    plan, _ = a_plan(1e9)
    with io.StringIO() as text:
        other = Alternative("step", peak=2 * GIB, sent=3 * GIB)
        show_plan(Console(file=text, width=200), replace(plan, alternative=other), [])
        lines = [" ".join(line.replace("│", "").split()) for line in text.getvalue().splitlines()]
    assert "layer 954 MiB 0 B" in lines
    assert "step (estimated) about 2 GiB about 3 GiB" in lines


def test_search(planned):
    search = planned["search"]
    meshes = [mesh for mesh, _ in search["candidates"]]
    assert all(math.prod(mesh.values()) == 8 for mesh in meshes)
    assert all(4 % mesh["tensor"] == 0 for mesh in meshes)  # heads
    assert all(16 % (mesh["data"] * mesh["fsdp"]) == 0 for mesh in meshes)  # rows
    assert all(mesh["sequence"] == 1 for mesh in meshes)  # 32 tokens cannot be split
    assert len({(*mesh.values(), remat) for mesh, remat in search["candidates"]}) == len(meshes)
    assert sorted(search["reported"]) == search["plans"]
    assert len(search["plans"]) == 2


def a_plan(peak: float, links: float = 1.0, **changes: Any) -> tuple[Plan, RunOptions]:
    """llama-3.1-8b over 64 chips of 95 GiB, 512 x 8192 tokens, as if it had been compiled."""
    chip = CHIPS["TPU v5"]
    model = replace(PLANNED.model, compute_dtype="bfloat16", remat=changes.pop("remat", "full"))
    mesh = {"stage": 1, "data": 1, "fsdp": 64, "sequence": 1, "tensor": 1} | changes
    plan = Plan(
        mesh=mesh,
        remat=model.remat,
        remat_save=(),
        remat_offload=(),
        batch_size=512,
        sequence_length=8192,
        micro_batches=1,
        fsdp_gather="layer",
        compute_dtype="bfloat16",
        device_kind="TPU v5",
        devices=64,
        hosts=1,
        attention="splash",
        attention_reason=None,
        sequence_order="zigzag",
        slowest_attention=1.0,
        pipeline=None,
        flops_per_token=3.0,
        counted_flops_per_token=4.0,
        compile_seconds=1.0,
        peak=peak,
        fits=peak <= chip.memory,
        refused=None,
        memory=None,
        collectives=(),
        traffic=(),
        alternative=None,
        chip=chip,
        roofline=Roofline(compute=8.0, memory=0.1, links=links, mfu=0.75, mfu_in_turn=0.5),
    )
    return plan, replace(PLANNED, model=model)


def test_idle_stages_are_shown() -> None:
    plan, _ = a_plan(1e9)
    for pipeline, line in (
        (Pipeline(8), "idle share of the stages, 8 micro-batches 11.1%"),
        (Pipeline(4, 3), "idle share of the stages, 4 micro-batches x 3 repeats 7.7%"),
    ):
        with io.StringIO() as text:
            mesh = {**plan.mesh, "stage": 2, "fsdp": 32}
            shown = replace(plan, mesh=mesh, pipeline=pipeline)
            show_plan(Console(file=text, width=200), shown, [])
            assert line in " ".join(text.getvalue().replace("│", "").split())


def test_advice() -> None:
    """The layers' inputs take 16 GiB of a device, "dots" takes 200: numbers one can check by hand."""
    config = PRESETS["llama-3.1-8b"]

    def advised(*measured: float, **changes: Any) -> list[str]:
        return advice(*a_plan(*measured, **changes), config)

    # in 4 micro-batches of 2 rows a device, "dots" keeps a quarter of 200 GiB instead of 16 GiB
    assert advised(50 * GIB) == [
        "--model.remat dots --micro-batches 4 would keep about 34.0 GiB more and save up to 25% of the "
        "FLOPs"
    ]
    # each micro-batch gathers the weights again, and the links have time for twice at most
    assert advised(50 * GIB, 4.0) == []
    assert advised(50 * GIB, 16.0) == [
        "communication takes 2.0 x the time of the matmuls; traffic hardly depends on the rows, so 1024 "
        "rows in a micro-batch would balance them"
    ]
    assert advised(math.nan) == []
    too_much = advised(105 * GIB, data=8, fsdp=8)
    assert too_much[0].startswith("--mesh.data 1 --mesh.fsdp 64 would save about 14.7 GiB")
    assert too_much[0].endswith("which is enough")
    assert too_much[1] == "--micro-batches 4 would save about 12.0 GiB, which is enough"
    assert advised(300 * GIB, remat="dots")[0] == (
        "--model.remat full would save about 184.0 GiB, of 205.0 GiB missing"
    )
    # 32 layers' inputs, 65,536 tokens of a device with 4,096 bfloat16 numbers; two float32 moments of a
    # 64th of 8.03 billion parameters
    assert advised(105 * GIB)[1:] == [
        "--model.remat-offload input would save about 16.0 GiB, which is enough",
        "--optimizer.offload would save about 0.9 GiB, of 10.0 GiB missing",
    ]


def test_advice_for_several_hosts() -> None:
    """With micro-batches, weights that are gathered within hosts alone send less over the network."""
    chip = CHIPS["NVIDIA H100 80GB HBM3"]
    plan, options = a_plan(30 * GIB, links=16.0)
    plan = replace(plan, chip=chip, hosts=8, micro_batches=8)
    options = replace(options, micro_batches=8)
    config = PRESETS["llama-3.1-8b"]

    def advised(plan: Plan) -> str:
        (sentence,) = advice(plan, options, config)
        return sentence

    begin = "communication takes 2.0 x the time of the matmuls; "
    assert advised(plan).startswith(begin + "--mesh.data 8 --mesh.fsdp 8 would take about ")
    # the state of a host's share takes 14.7 GiB more; over several hosts it would save nothing
    full = replace(plan, peak=chip.usable_memory - 14 * GIB)
    assert advised(full).startswith(begin + "traffic hardly depends on the rows")
    # 64.8 rows, rounded up to what the mesh divides
    limits = Roofline(compute=8.0, memory=0.1, links=8.1, mfu=0.75, mfu_in_turn=0.5)
    alone = replace(plan, hosts=1, roofline=limits)
    assert advised(alone).endswith("so 128 rows in a micro-batch would balance them")


def test_command(planned):
    """The flags of `run`, no data, the preset's vocabulary; the result as JSON."""
    assert planned["command"]["code"] == 0
    result = planned["command"]["json"]
    assert result["mesh"] == {"stage": 1, "data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert result["memory"]["parameters"] == 4_000_000 * 4 // 8
    assert result["roofline"] is None
    assert result["collectives"][0]["kind"] == "all-gather"


def plan_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "train", "plan", *arguments)
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give exactly one of --topology and --host-devices"),
        (
            "--topology v5p:4x4x4 --host-devices 8",
            "give exactly one of --topology and --host-devices",
        ),
        ("--host-devices 0", "host-devices: found 0, expected at least 1"),
        ("--host-devices 8 --model.preset llama-9", "model.preset: found 'llama-9'"),
        ("--host-devices 8 --batch-size 12", "batch-size: found 12 rows in a micro-batch"),
        ("--host-devices 8 --mesh.fsdp 3", "mesh: found data 1 x fsdp 3"),
        (
            "--host-devices 8 --mesh.sequence 8 --mesh.fsdp 1 --sequence-length 8200",
            "sequence-length: found 8200, expected a multiple of 16, twice the mesh's sequence axis; or "
            "--mesh.sequence-order contiguous",
        ),
        ("--host-devices 8 --search --limit 0", "limit: found 0, expected at least 1"),
        (
            "--topology v9:4x4",
            "topology: found 'v9:4x4', expected TPUs (v4, v5p, v5e, v6e) such as",
        ),
        ("--topology v5p:4x4x6", "topology: found 'v5p:4x4x6', expected three lengths that are"),
        ("--host-devices 7 --search", "batch-size: found 512 rows in 1 micro-batches"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, message: str) -> None:
    done = plan_process(*arguments.split())
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_error_says_what_to_install() -> None:
    done = plan_process("--topology", "v5p:4x4x4")
    assert done.returncode == 2
    assert done.stderr.endswith("is not installed; in the checkout: pip install '.[plan]'\n")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiles for TPUs, which needs libtpu: pip install '.[plan]'",
)


@pytest.mark.slow
@needs_libtpu
def test_a_topology(tmp_path: Path) -> None:
    """Splash attention over a mesh, bfloat16, against the data sheet; also a batch that is too large."""
    file = tmp_path / "plan.json"
    common = ("--topology", "v5e:2x2", "--model.preset", "tiny-4m", "--sequence-length", "512")
    mesh = ("--mesh.fsdp", "2", "--mesh.sequence", "2", "--json", str(file))
    done = plan_process(*common, *mesh, "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["attention"] == "splash"
    assert result["compute_dtype"] == "bfloat16"
    assert result["device_kind"] == "TPU v5 lite"
    assert result["fits"] is True
    assert result["peak"] < result["chip"]["memory"]
    assert 0 < result["roofline"]["mfu_in_turn"] <= result["roofline"]["mfu"] <= 1
    assert result["counted_flops_per_token"] / result["flops_per_token"] < 1.5
    assert result["slowest_attention"] == 1
    assert "attention of the slowest sequence shard (zigzag)" in done.stdout

    offloaded = ("--model.remat-offload", "input", "--optimizer.offload")
    done = plan_process(*common, *mesh, "--batch-size", "8", "--model.remat", "full", *offloaded)
    assert done.returncode == 0, done.stderr
    assert "remat full + input (host)" in done.stdout
    moved = json.loads(file.read_text())["memory"]
    # both moments but the two counts of steps, and 4 layers' inputs of 1024 tokens of 128 bfloat16
    residuals = 4 * 8 * 512 // 4 * PRESETS["tiny-4m"].hidden_size * 2
    assert moved["host"] >= moved["optimizer_state"] - 8 + residuals
    assert moved["arguments"] < result["memory"]["arguments"] - 0.9 * moved["optimizer_state"]

    done = plan_process(*common, *mesh, "--batch-size", "65536", "--model.remat", "none")
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["fits"] is False
    assert "does not fit" in done.stdout
    assert "--model.remat full would save" in done.stdout


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("micro_batches", ["1", "4"])
def test_two_slices(tmp_path: Path, micro_batches: str) -> None:
    """Replicas on two slices of four chips: each chip sends its quarter of the gradients over, once."""
    file = tmp_path / "plan.json"
    words = "--topology 2xv5e:2x2 --model.preset tiny-4m --sequence-length 512 --batch-size 64"
    flags = ("--mesh.data", "2", "--micro-batches", micro_batches, "--json", str(file))
    done = plan_process(*words.split(), *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["mesh"] == {"stage": 1, "data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
    rows = {row["links"]: row for row in result["traffic"]}
    quarter = result["memory"]["parameters"]
    # an all-reduce among two sends the array once; the embedding's gradient is not split for it
    assert rows["DCN"]["axes"] == ["data"]
    assert quarter <= rows["DCN"]["sent"] <= 1.5 * quarter
    assert rows["DCN"]["seconds"] == pytest.approx(rows["DCN"]["sent"] / 3.125e9)
    assert rows["ICI x y"]["axes"] == ["fsdp"]
    assert result["roofline"]["links"] == pytest.approx(rows["DCN"]["seconds"])
