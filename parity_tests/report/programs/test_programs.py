"""One layer at a time gives the numbers of the whole model, in every program of the report."""

from pathlib import Path

import numpy as np
import pytest
import torch

from parity_tests.harness.cases import BY_NAME, hf_model, weights_of, write_hf_directory
from parity_tests.harness.programs import hf_numbers, oracle_numbers, our_model, our_numbers
from parity_tests.reference.errors import rms_error, worst
from parity_tests.report.programs.checkpoint import EMBEDDING, open_checkpoint
from parity_tests.report.programs.jax_layers import JaxProgram
from parity_tests.report.programs.oracle_layers import OracleProgram
from parity_tests.report.programs.program import CanGenerate, Program
from parity_tests.report.programs.steps import LAYER_STEPS, OUTPUT
from parity_tests.report.programs.torch_layers import TorchProgram

LENGTH = 40
FLOAT32 = np.dtype(np.float32)
SLOW = ["rope_llama31", "mlp_bias", "attention_bias", "padding_token_negative_tied"]
CASES = ["everything", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def streamed_numbers(program: Program, ids: np.ndarray, layers: int) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient, named as in `parity_tests.harness.programs`."""
    inputs = [program.embed(ids)]
    for layer in range(layers):
        inputs.append(program.layer(layer, inputs[-1])[OUTPUT])
    hidden = program.norm(inputs[-1])
    numbers = {
        "logits": torch.cat(list(program.logits(hidden, 16)))[None],
        "loss": torch.tensor(program.loss(hidden, ids), dtype=torch.float64),
    }
    cotangent, gradients = program.head_vjp(inputs.pop(), ids)
    of_head = gradients.pop(EMBEDDING, 0)  # where it is tied
    for layer in reversed(range(layers)):
        cotangent, of_layer = program.layer_vjp(layer, inputs.pop(), cotangent)
        gradients |= {f"model.layers.{layer}.{name}": value for name, value in of_layer.items()}
    gradients[EMBEDDING] = program.embed_vjp(ids, cotangent) + of_head
    return numbers | {f"grad {name}": value for name, value in gradients.items()}


@pytest.mark.parametrize("name", CASES)
def test_layer_by_layer_is_the_whole_model(name: str, tmp_path: Path) -> None:
    config = BY_NAME[name].config
    weights = weights_of(config)
    checkpoint = open_checkpoint(write_hf_directory(tmp_path / "hf", config, weights))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (1, LENGTH))
    inputs, layers = {"input_ids": ids, "labels": ids}, config["num_hidden_layers"]
    for make, full_model, bar in (
        (OracleProgram, oracle_numbers(config, weights, inputs), 1e-13),
        (TorchProgram, hf_numbers(hf_model(config, weights), inputs), 3e-6),
        (JaxProgram, our_numbers(our_model(config, weights, np.float32), inputs), 3e-6),
    ):
        program = make(checkpoint, FLOAT32)
        error, number = worst(streamed_numbers(program, ids, layers), full_model)
        assert error <= bar, f"{program.name}, {number}: {error:.1e}"


def test_all_programs_return_the_same_steps(tmp_path: Path) -> None:
    config = BY_NAME["gqa_3_to_1"].config
    checkpoint = open_checkpoint(write_hf_directory(tmp_path / "hf", config, weights_of(config)))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (1, LENGTH))
    programs = [make(checkpoint, FLOAT32) for make in (OracleProgram, TorchProgram, JaxProgram)]
    exact, *others = (program.layer(0, program.embed(ids)) for program in programs)
    assert tuple(exact) == LAYER_STEPS
    for steps in others:
        assert tuple(steps) == LAYER_STEPS
        for name, value in steps.items():
            assert value.shape == exact[name].shape, name
            assert rms_error([value], [exact[name]]) < 1e-6, name


def test_which_programs_generate(tmp_path: Path) -> None:
    config = BY_NAME["gqa_2_to_1"].config
    checkpoint = open_checkpoint(write_hf_directory(tmp_path / "hf", config, weights_of(config)))
    programs = [make(checkpoint, FLOAT32) for make in (OracleProgram, TorchProgram, JaxProgram)]
    assert [isinstance(p, CanGenerate) for p in programs] == [False, True, True]
