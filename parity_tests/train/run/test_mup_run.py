"""A run with muP: its export is a plain Llama, the same function in PyTorch; a run goes on from it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from llama_jax import LlamaForCausalLM
from parity_tests.reference.errors import relative_error, rms_error
from parity_tests.reference.oracle import oracle
from parity_tests.reference.tolerances import FLOAT64_BAR, ROUNDING_RATIO
from parity_tests.train.runs import CONFIG, run_flags
from train.__main__ import main

MUP = {"model__parametrization": "mup", "model__mup_base_hidden_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_export_is_the_same_function_in_pytorch(tied, tiny, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    run, exported = tmp_path / "run", tmp_path / "hf"
    assert main(run_flags(tiny, run, model__config=config, **MUP)) == 0
    assert main(["export", str(run), str(exported), "--verify"]) == 0
    assert "reported by the run" in capsys.readouterr().err
    written = json.loads((exported / "config.json").read_text())
    assert not [name for name in written if "mup" in name or "multiplier" in name]

    # in float64 as the oracle, in float32 no further from it than transformers
    ids = np.random.default_rng(0).integers(0, 64, (8, 16))
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    weights = dict(theirs.state_dict())
    if tied:
        del weights["lm_head.weight"]
    expected = oracle(written, weights, input_ids=torch.from_numpy(ids)).logits.numpy()
    with torch.no_grad():
        theirs_logits = theirs(torch.from_numpy(ids)).logits.numpy()
    ours = LlamaForCausalLM.from_pretrained(exported, dtype=jnp.float32)(ids).logits
    ratio = rms_error([ours], [expected]) / rms_error([theirs_logits], [expected])
    assert ratio <= ROUNDING_RATIO
    with jax.enable_x64(True):
        exact = LlamaForCausalLM.from_pretrained(exported, dtype=jnp.float64)(ids).logits
        assert relative_error(exact, expected) <= FLOAT64_BAR

    # its head, or the norm before a tied one, began at half of the narrow model's
    name = "model.norm.weight" if tied else "lm_head.weight"
    weight = load_file(exported / "model.safetensors")[name]
    rms = 1.0 if tied else 0.02
    assert 0.3 * rms < np.sqrt(np.mean(weight**2)) < 0.8 * rms

    # and a run goes on from the weights, with the same learning rates
    flags = run_flags(tiny, tmp_path / "more", steps=1, optimizer__learning_rate=0.0, **MUP)
    flags = [flag for flag in flags if "model.config" not in flag and "warmup" not in flag]
    assert main([*flags, "--model.init-from", str(exported)]) == 0


def test_a_base_that_does_not_fit_leaves_no_folder(tiny, tmp_path, capsys):
    wrong = MUP | {"model__mup_base_hidden_size": 7}
    assert main(run_flags(tiny, tmp_path / "run", **wrong)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: model.mup-base-intermediate-size: found none, and 48 x 7 / 32 is"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_state_for_torch_is_refused(tiny, tmp_path, capsys):
    assert main(run_flags(tiny, tmp_path / "run", steps=1, optimizer__warmup_steps=0, **MUP)) == 0
    capsys.readouterr()
    command = ["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--with-optimizer"]
    assert main(command) == 2
    assert "model.parametrization: found mup, expected standard: " in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
