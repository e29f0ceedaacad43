"""generation_config.json of other people: null, 0, lists and texts mean what they do in transformers."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from llama_jax import GenerationConfig, LlamaConfig, LlamaForCausalLM
from llama_jax.generation.sampling import Sampling, checked

PROMPT = [[5, 6, 7]]
JUNK = [None, 0, 0.0, -1, 1.5, True, False, [], [3], {}, "x", "0.7", float("nan"), 10**400]
DRAWING = ["temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, LlamaForCausalLM, list[int]]:
    """A directory, transformers' model and ours of it, and transformers' greedy tokens."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
    )
    directory = tmp_path_factory.mktemp("pair")
    theirs.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    tokens = theirs.generate(torch.tensor(PROMPT), max_new_tokens=4, do_sample=False).tolist()[0]
    return directory, theirs, LlamaForCausalLM.from_pretrained(directory), tokens


def chosen(model: LlamaForCausalLM, fields: dict[str, Any]) -> Sampling:
    """How a generation of the model with these fields chooses its tokens."""
    model.generation_config = GenerationConfig.from_dict(fields, model.config)
    return checked(model.generation_config.sampling())


def test_zero_temperature_without_do_sample_is_greedy_with_a_warning(pair):
    directory, _, _, expected = pair
    path = directory / "generation_config.json"
    path.write_text('{"do_sample": false, "temperature": 0.0}')
    try:
        theirs = transformers.LlamaForCausalLM.from_pretrained(directory)
        assert theirs.generate(torch.tensor(PROMPT), max_new_tokens=4).tolist()[0] == expected
        with pytest.warns(UserWarning, match="temperature without do_sample"):
            ours = LlamaForCausalLM.from_pretrained(directory)
    finally:
        path.unlink()
    tokens = ours.generate(np.array(PROMPT), max_new_tokens=4)
    assert np.asarray(tokens)[0].tolist() == expected


@pytest.mark.parametrize("eos", [-1, 64, [64, -1]])
def test_end_tokens_outside_the_vocabulary_are_ignored(pair, eos):
    directory, theirs, _, expected = pair
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": eos, "pad_token_id": -1}))
    try:
        theirs = transformers.LlamaForCausalLM.from_pretrained(directory)
        assert theirs.generate(torch.tensor(PROMPT), max_new_tokens=4).tolist()[0] == expected
        with pytest.warns(UserWarning, match="outside the vocabulary of 64; ignored"):
            ours = LlamaForCausalLM.from_pretrained(directory)
    finally:
        path.unlink()
    assert ours.generate(jax.numpy.asarray(PROMPT), max_new_tokens=4).tolist()[0] == expected
    config = ours.generation_config
    assert (config.eos_token_ids, config.pad_token_id) == ((), None)


@pytest.mark.parametrize("do_sample", [False, None, 0, [], {}, ""], ids=str)
def test_sampling_options_are_ignored_without_do_sample(pair, do_sample):
    _, _, model, _ = pair
    for name in DRAWING:
        for value in JUNK:
            assert chosen(model, {"do_sample": do_sample, name: value}) == Sampling()


# with do_sample: null is absent, these mean nothing, and transformers refuses those below
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": None},
        {"top_k": None},
        {"top_k": 0.0},
        {"top_k": False},
        {"top_p": None},
        {"top_p": 1.5},
        {"min_p": None},
        {"repetition_penalty": None},
    ],
    ids=str,
)
def test_neutral_sampling_options(pair, fields):
    _, _, model, _ = pair
    top_k = 50 if fields.get("top_k", None) is None else None
    assert chosen(model, {"do_sample": True, **fields}) == Sampling(do_sample=True, top_k=top_k)


def test_a_top_p_of_zero_is_greedy(pair):
    _, _, model, expected = pair
    fields = {"do_sample": True, "top_p": 0}
    model.generation_config = GenerationConfig.from_dict(fields, model.config)
    tokens = model.generate(np.array(PROMPT), max_new_tokens=4, key=jax.random.key(0))
    assert np.asarray(tokens)[0].tolist() == expected


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", [0, -1, "0.7", [1.0], {}])
def test_values_that_transformers_rejects_are_one_line_errors(pair, name, value):
    _, _, model, _ = pair
    with pytest.raises(ValueError, match=f"{name}: found") as error:
        chosen(model, {"do_sample": True, name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, (2,)), (3, (3,)), (3.0, (3,)), (True, (1,)), ([], ()), ([3, 4], (3, 4)), (-1, ())],
)
def test_eos_token_ids(value, expected):
    config = LlamaConfig(eos_token_id=2)
    assert GenerationConfig.from_dict({"eos_token_id": value}, config).eos_token_ids == expected


def test_fields_may_hold_anything():
    """The result is a config or a one-line error."""
    config, names = LlamaConfig(), (*transformers.GenerationConfig().to_dict(), "do_sample")
    for name in names:
        for value in JUNK:
            for fields in ({name: value}, {"do_sample": True, name: value}):
                try:
                    read = GenerationConfig.from_dict(json.loads(json.dumps(fields)), config)
                    assert isinstance(read.unused | read.unimplemented, dict)
                    read.default(name)
                except ValueError as error:
                    assert "\n" not in str(error)
