"""The real checkpoint: converted, run by both, equal to the oracle's rule and in its greedy tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import convert
from llama_jax import PRESETS, LlamaForCausalLM
from llama_jax.evaluation.scoring import token_scores
from llama_jax.files.json_object import read_json_object
from llama_jax.inspection.architecture import parameter_count
from llama_jax.text.tokenizer import load_tokenizer
from parity_tests.harness import demo_checkpoint
from parity_tests.reference.errors import rms_error
from parity_tests.reference.oracle import oracle
from parity_tests.reference.tolerances import ROUNDING_RATIO

pytestmark = pytest.mark.checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "SmolLM2-135M-Instruct"
    convert.convert(demo_checkpoint.fetch(), path)
    return path


@pytest.fixture(scope="module")
def both(directory):
    torch.set_num_threads(2)
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(directory), theirs.eval()


def test_it_is_the_preset(both):
    ours, _ = both
    preset = PRESETS["smollm2-135m"]
    assert parameter_count(ours.config) == parameter_count(preset) == 134_515_008
    for field in (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope",
    ):
        assert getattr(ours.config, field) == getattr(preset, field)


def test_logits_on_real_text(directory, both):
    ours, theirs = both
    text = " ".join((transformers.LlamaModel.__doc__ or "", str(transformers.LlamaConfig.__doc__)))
    ids = np.asarray([load_tokenizer(directory).encode(text).ids[:256]])
    tokens = torch.from_numpy(ids)
    logits = jax.jit(lambda model, ids: model(ids).logits)(ours, jnp.asarray(ids, jnp.int32))
    with torch.no_grad():
        weights = {name: value.double() for name, value in theirs.named_parameters()}
        config = read_json_object(directory / "config.json")
        exact = oracle(config, weights, input_ids=tokens).logits
        torch_logits = theirs(tokens).logits
    assert rms_error([logits], [exact]) <= ROUNDING_RATIO * rms_error([torch_logits], [exact])


def test_greedy_tokens_with_and_without_left_padding(directory, both):
    ours, theirs = both
    tokenizer = load_tokenizer(directory)
    rows = [
        tokenizer.encode(prompt).ids
        for prompt in (
            "The capital of France is",
            "def fibonacci(n):",
            "Once upon a time there was",
        )
    ]
    width = max(map(len, rows))
    ids = np.asarray([[2] * (width - len(row)) + row for row in rows])
    mask = np.asarray([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    got = np.asarray(ours.generate(ids, mask, max_new_tokens=200))
    with torch.no_grad():
        want = theirs.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=200,
            do_sample=False,
        ).numpy()
    np.testing.assert_array_equal(got, want)


def test_scores_of_real_text_are_those_of_log_softmax(directory, both):
    ours, theirs = both
    ids = load_tokenizer(directory).encode(str(transformers.LlamaConfig.__doc__)).ids
    sequences = [ids[:129], ids[100:140], ids[:7]]
    for tokens, scores in zip(sequences, token_scores(ours, sequences), strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([tokens[:-1]])).logits[0]
        targets = torch.tensor(tokens[1:])
        want = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
        assert rms_error([scores.log_probs], [want]) < 1e-5
        np.testing.assert_array_equal(scores.greedy, (logits.argmax(-1) == targets).numpy())
