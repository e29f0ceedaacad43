"""A layer at a time is the whole model: every program of the report beside what it streams."""

from pathlib import Path

import numpy as np
import pytest
import torch

from parity_tests.harness.cases import BY_NAME, hf_model, weights_of, write_hf_directory
from parity_tests.harness.programs import hf_numbers, oracle_numbers, our_model, our_numbers
from parity_tests.reference.errors import rms_error, worst
from parity_tests.report.programs import jax_layers, oracle_layers, torch_layers
from parity_tests.report.programs.checkpoint import EMBEDDING, open_checkpoint
from parity_tests.report.programs.program import LAYER_STEPS, Program

LENGTH = 40
SLOW = ["rope_llama31", "mlp_bias", "attention_bias", "padding_token_negative_tied"]
CASES = ["everything", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def streamed_numbers(program: Program, ids: np.ndarray, layers: int) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient, as `parity_tests.harness.programs` has them."""
    inputs = [program.embed(ids)]
    for layer in range(layers):
        inputs.append(program.layer(layer, inputs[-1])[1])
    hidden = program.norm(inputs[-1])
    numbers = {
        "logits": program.head()(hidden, 0, ids.shape[1])[None],
        "loss": torch.tensor(program.loss(hidden, ids), dtype=torch.float64),
    }
    cotangent, found = program.head_vjp(inputs.pop(), ids)
    head = found.pop(EMBEDDING, None)
    for layer in reversed(range(layers)):
        cotangent, gradients = program.layer_vjp(layer, inputs.pop(), cotangent)
        found |= {f"model.layers.{layer}.{name}": value for name, value in gradients.items()}
    found[EMBEDDING] = program.embed_vjp(ids, cotangent, head)
    return numbers | {f"grad {name}": value for name, value in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_streaming_changes_nothing(name: str, tmp_path: Path) -> None:
    config = BY_NAME[name].config
    weights = weights_of(config)
    checkpoint = open_checkpoint(write_hf_directory(tmp_path / "hf", config, weights))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (1, LENGTH))
    inputs, layers = {"input_ids": ids, "labels": ids}, config["num_hidden_layers"]
    exact = oracle_numbers(config, weights, inputs)
    for module, whole, bar in (
        (oracle_layers, exact, 1e-13),
        (torch_layers, hf_numbers(hf_model(config, weights), inputs), 3e-6),
        (jax_layers, our_numbers(our_model(config, weights, np.float32), inputs), 3e-6),
    ):
        program = module.program(checkpoint, np.dtype(np.float32), LENGTH)
        error, number = worst(streamed_numbers(program, ids, layers), whole)
        assert error <= bar, f"{program.name}, {number}: {error:.1e}"


def test_all_programs_hand_out_the_same_steps(tmp_path: Path) -> None:
    config = BY_NAME["gqa_3_to_1"].config
    checkpoint = open_checkpoint(write_hf_directory(tmp_path / "hf", config, weights_of(config)))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (1, LENGTH))
    programs = [
        module.program(checkpoint, np.dtype(np.float32), LENGTH)
        for module in (oracle_layers, torch_layers, jax_layers)
    ]
    (want, _), *others = (program.layer(0, program.embed(ids)) for program in programs)
    assert tuple(want) == LAYER_STEPS
    for got, _ in others:
        assert tuple(got) == LAYER_STEPS
        for name, value in got.items():
            assert value.shape == want[name].shape, name
            assert rms_error([value], [want[name]]) < 1e-6, name
