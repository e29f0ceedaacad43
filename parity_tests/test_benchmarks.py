"""Parts of the benchmarks: emulated precision, drift from the oracle, presets grouped by shape."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn.functional import cross_entropy, kl_div

import benchmarks.conversion as conversion
import benchmarks.decode as decode
import benchmarks.llama_cpp as llama_cpp
import benchmarks.shared_context as shared_context
import benchmarks.step as step
from benchmarks.__main__ import main
from benchmarks.foreign_checkpoints import FOREIGN
from benchmarks.isolated import FailedError, measure
from benchmarks.parity import same_shapes
from benchmarks.precision import BFLOAT16, TF32, drift, emulated, emulated_einsum
from benchmarks.real_checkpoint import real_checkpoint
from benchmarks.report import markdown
from benchmarks.start_up import timed
from benchmarks.user_environment import user_environment
from convert.formats import registry
from llama_jax import PRESETS, LlamaConfig, LlamaForCausalLM
from llama_jax.inspection.architecture import tensors

# Rounding to b bits leaves a uniform error of one ulp / sqrt(12); of normal numbers that is 0.21 * 2**-b.
ROUNDED = 0.21


def rms_error(bits: int, parts: int) -> float:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=size).astype(np.float32) for size in ((64, 256), (256, 64)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    einsum = jax.jit(emulated_einsum, static_argnames=("spec", "bits", "parts"))
    values = np.asarray(einsum("ij,jk->ik", a, b, bits=bits, parts=parts))
    return float(np.sqrt(np.mean(np.square(values - exact)) / np.mean(np.square(exact))))


@pytest.mark.parametrize("bits", [BFLOAT16, TF32])
def test_one_pass_has_the_error_of_rounding_both_operands(bits: int) -> None:
    assert rms_error(bits, 1) == pytest.approx(2**0.5 * ROUNDED * 2.0**-bits, rel=0.1)


def test_three_passes_have_second_order_errors_and_six_those_of_float32() -> None:
    # what two roundings leave of each operand, and the product of what one leaves of both
    assert rms_error(BFLOAT16, 2) == pytest.approx(
        3**0.5 * (ROUNDED * 2.0**-BFLOAT16) ** 2, rel=0.1
    )
    assert rms_error(BFLOAT16, 3) < 4e-7


def test_every_matmul_of_the_model_is_emulated() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    ids = jnp.ones((1, 8), jnp.int32)

    def matmuls() -> int:
        traced = jax.make_jaxpr(lambda model: model(ids).logits)(model)
        return str(traced).count("dot_general[")

    plain = matmuls()
    assert plain
    for parts, passes in ((1, 1), (2, 3), (3, 6)):
        with emulated(BFLOAT16, parts):
            assert matmuls() == passes * plain
    assert matmuls() == plain


def test_drift_in_blocks_is_drift_at_once() -> None:
    torch.manual_seed(0)
    exact = torch.randn(150, 11, dtype=torch.float64)
    logits = (exact + 0.1 * torch.randn(150, 11)).float()
    ids = torch.randint(11, (1, 150))
    errors = (logits - exact).square().mean(1) / exact.square().mean(1)
    logs = [values.double().log_softmax(-1) for values in (exact, logits)]
    losses = [cross_entropy(values[:-1], ids[0, 1:]) for values in logs]
    assert drift(logits.numpy(), exact, ids.numpy()) == pytest.approx(
        (
            float(errors.mean().sqrt()),
            float(kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")),
            float((logits.argmax(1) == exact.argmax(1)).double().mean()),
            float(losses[1] - losses[0]),
        )
    )


def test_presets_of_the_same_shape_share_a_row() -> None:
    groups = same_shapes(list(PRESETS))
    assert sorted(name for names in groups for name in names) == sorted(PRESETS)
    assert ["llama-7b", "llama-2-7b"] in groups
    assert ["llama-3-70b", "llama-3.1-70b"] in groups
    assert ["llama-2-70b"] in groups  # another vocabulary


TIMINGS = [
    step.Timing("ours", "bfloat16", 2, 0.5, 3 << 20),
    step.Timing("torch eager", "bfloat16", 1, 0.5, 2 << 20),
]


def test_the_table_of_steps_compares_tokens_per_second() -> None:
    """Programs may have different numbers of rows; a chip with a data sheet has an MFU."""
    workload = step.Workload("llama-3.2-1b", 2, 8192)
    report = step.tabulate(workload, TIMINGS, ["torch.compile: no"], "NVIDIA H100 80GB HBM3")
    ours, theirs = report.values
    assert ours["tokens_per_second"] == 2 * theirs["tokens_per_second"] == 2 * 8192 / 0.5
    assert report.rows[0][5:8] == ["2.00", "3", "1.50"]
    # 6 FLOPs a token for each of the 1.236e9 weights, and the matmuls of causal attention
    attention = 3 * 2 * 16 * 32 * 64 * 8193
    assert ours["mfu"] == pytest.approx(32768 * (6 * 1.2358e9 + attention) / 989e12, rel=1e-3)
    text = markdown(report)
    assert "| ours | bfloat16 | 2 | 0.500 | 32768 | 2.00 |" in text
    assert "skipped: torch.compile: no" in text


def test_fewer_rows_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measured(function: str, workload: step.Workload, *names: str) -> dict:
        tried.append(workload.rows)
        if workload.rows > 1:
            raise FailedError("torch.OutOfMemoryError: CUDA out of memory. Tried ...")
        return TIMINGS[1]._asdict()

    monkeypatch.setattr(step, "measure", measured)
    workload = step.Workload("llama-3.2-1b", 4, 8192)
    assert step.time_isolated(workload, "torch eager", "bfloat16") == TIMINGS[1]
    assert tried == [4, 2, 1]


def test_a_failed_measurement_says_why() -> None:
    with pytest.raises(FailedError, match="KeyError: 'no-such-preset'"):
        measure("step:time_alone", ["no-such-preset", 1, 8], "ours", "bfloat16")


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu.device_kind", lambda: None)
    assert main(["gpu"]) == 0
    assert capsys.readouterr().out == "no NVIDIA GPU here: nothing was run\n"
    assert main(["gpu", "--parts", "stop"]) == 2
    assert "found 'stop', expected one of step, loss, decode, tests" in capsys.readouterr().err


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_checkpoints_of_other_programs_can_be_read(tmp_path: Path, kind: str) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=8,
        rope_parameters=PRESETS["llama-3.1-8b"].rope_parameters,
        max_position_embeddings=PRESETS["llama-3.1-8b"].max_position_embeddings,
        rms_norm_eps=1e-5,
    )
    FOREIGN[kind](config, tmp_path / kind)
    checkpoint = registry.read(tmp_path / kind, tokenizer=False)
    shapes = {spec.name: spec.shape for spec in checkpoint.tensors}
    assert shapes == {tensor.name: tuple(tensor.shape) for tensor in tensors(config)}
    for name, shape in shapes.items():
        values = checkpoint.load(name).astype(np.float64)
        assert values.shape == shape
        assert np.isfinite(values).all()
        assert values.std() > 0


def test_a_conversion_is_compared_with_cp_by_bytes_and_processor_time() -> None:
    """One that reads 1 and writes 3 moves twice what `cp` of its source moves."""
    timing = conversion.Timing("a-b", 12.0, 8.0, 1, 100, 300, 3.0, 1.0, 0.5)
    assert timing.ratio == pytest.approx(2.0)
    assert timing.processor_ratio == pytest.approx(4.0)


def test_what_was_run_is_measured(tmp_path: Path) -> None:
    seconds, used, printed = conversion.timed(["sh", "-c", "echo 5"])
    assert (seconds > 0, used >= 0, printed) == (True, True, "5\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_bytes(b"12345")
    assert conversion.size(tmp_path) == conversion.size(tmp_path / "folder/file") == 5
    conversion.forget(tmp_path)
    assert (tmp_path / "folder/file").read_bytes() == b"12345"


@pytest.mark.parametrize("pair", ["hf", "hf-fp8", "orbax-hf"])
def test_a_pair_without_its_source_is_an_error(pair: str) -> None:
    with pytest.raises(ValueError, match="--pairs"):
        conversion.require_sources([pair])


def test_a_command_is_timed_until_it_prints_and_until_it_ends() -> None:
    program = "import time; print('x', flush=True); time.sleep(0.2); print('y')"
    times = timed([sys.executable, "-c", program])
    assert 0 < times.first <= times.total - 0.2
    assert times.processor > 0
    with pytest.raises(ValueError, match="failed: no such thing"):
        timed([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_commands_are_measured_with_bytecode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "module.py").touch()
    show = "import sys, module; print(module.__cached__)"
    with user_environment() as environment:
        variables = {**environment, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", show]
        printed = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
        assert Path(printed.stdout.strip()).is_file()
    assert not (tmp_path / "__pycache__").exists()


def test_texts_that_begin_alike_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_context, "ROUNDS", 1)
    config = replace(PRESETS["tiny-4m"], num_hidden_layers=1)
    found = shared_context.report(LlamaForCausalLM(config, rngs=nnx.Rngs(0)), context=20, count=3)
    assert [row[0].split(",")[0] for row in found.rows] == [
        *("score", "the same with 3 continuations", "chat", "the same")
    ]
    (values,) = found.values
    assert values["ratios"].keys() == {"all", "kept"}


def test_each_program_is_beside_the_faster_transformers_and_its_own_bytes() -> None:
    seconds = {"first 1": 1.0, "all 1": 3.0, "first 8": 1.0, "all 8": 9.0, "prefill": 4.0}
    slow = {key: 2 * value for key, value in seconds.items()}
    by_program = {"ours": seconds, "ours, 8 bits": seconds, "HF, dynamic cache": slow}
    sizes = {"ours": 400, "ours, 8 bits": 100, "HF, dynamic cache": 400}
    found = decode.tabulate("title", by_program, [], decode.Shape("", new=3), sizes, 800.0)
    one = {row[0]: row for row in found.rows if row[1] == "1"}
    assert one["ours"][2:5] == ["1.0", "2.00", "50%"]  # a step takes a second
    assert one["ours, 8 bits"][4] == "12%"
    assert one["HF, dynamic cache"][2:5] == ["0.5", "1.00", "25%"]


def test_llama_cpp_is_left_out_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(llama_cpp.VARIABLE, raising=False)
    assert decode.llama_cpp_files(tmp_path, tmp_path, 1) == {}
    monkeypatch.setenv(llama_cpp.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="LLAMA_CPP: no libllama in"):
        decode.llama_cpp_files(tmp_path, tmp_path, 1)


@pytest.mark.checkpoint
@pytest.mark.skipif(llama_cpp.VARIABLE not in os.environ, reason=llama_cpp.HOW_TO_GET_IT)
def test_llama_cpp_generates_what_we_do(tmp_path: Path) -> None:
    with real_checkpoint() as directory:
        model = LlamaForCausalLM.from_pretrained(directory, dtype=jnp.float32)
        files = decode.llama_cpp_files(directory, tmp_path, 1)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (8, 16))
    ours = np.asarray(model.generate(ids, max_new_tokens=6, eos_token_id=()))[:, 16:]
    generate, _ = files["llama.cpp, F32"]
    assert np.array_equal(generate(ids, 6), ours)
