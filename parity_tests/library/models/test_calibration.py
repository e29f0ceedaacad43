"""Models that are quantized by what their matrices multiply with on a text."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from llama_jax import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    quantize,
    quantize_calibrated,
)
from llama_jax.__main__ import main
from llama_jax.quantization.model import matrices_by_bits, quantization_of

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    initializer_range=0.2,
)
IDS = np.random.default_rng(0).integers(0, 61, (12, 32)).astype(np.int32)
NEW_IDS = np.random.default_rng(1).integers(0, 61, (8, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)


def change(model, other) -> float:
    """What quantization did to the hidden states of another text."""
    before, after = (of.model(NEW_IDS).last_hidden_state for of in (model, other))
    return float(jnp.linalg.norm((after - before).astype(jnp.float32)))


@pytest.mark.parametrize("kind", [(8, None), (8, 16), (4, 16), (4, None)])
def test_less_changes_than_by_rounding(model, kind):
    rounded, calibrated = quantize(model, *kind), quantize_calibrated(model, IDS, *kind)
    assert quantization_of(calibrated) == quantization_of(rounded)
    assert matrices_by_bits(calibrated) == matrices_by_bits(rounded)
    assert change(model, calibrated) < change(model, rounded)


def test_the_given_model_is_not_changed(model):
    before = model(NEW_IDS).logits
    quantize_calibrated(model, IDS, 4, 16)
    assert quantization_of(model) is None
    assert np.array_equal(model(NEW_IDS).logits, before)


def test_saved_and_loaded_bitwise(tmp_path, model):
    calibrated = quantize_calibrated(model, IDS, 4, 16)
    calibrated.save_pretrained(tmp_path / "model")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert np.array_equal(loaded(NEW_IDS).logits, calibrated(NEW_IDS).logits)


def test_other_models(model):
    """A decoder, a task head, bfloat16, tied embeddings, sums in slices."""
    decoder = LlamaModel(CONFIG, rngs=nnx.Rngs(0))
    assert quantize_calibrated(decoder, IDS, 8)(NEW_IDS).last_hidden_state.shape == (8, 32, 32)
    classifier = LlamaForSequenceClassification(CONFIG, rngs=nnx.Rngs(0))
    assert quantize_calibrated(classifier, IDS, 8)(NEW_IDS[:1]).logits.shape == (1, 2)
    config = replace(CONFIG, tie_word_embeddings=True, pretraining_tp=2)
    tied = LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    kinds = quantize(tied, 4, 16), quantize_calibrated(tied, IDS, 4, 16)
    assert change(tied, kinds[1]) < change(tied, kinds[0])
    assert kinds[1](NEW_IDS).logits.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[0], r"input_ids: found shape \(32,\), expected \[rows, seq\]"),
        (IDS[:0], r"input_ids: found shape \(0, 32\)"),
        (np.full((1, 4), 61), "input_ids: found token 61, expected 0 to 60"),
        (np.full((1, 4), 0.5), "input_ids: found dtype float64"),
        (np.zeros((1, 4096), np.int32), "with seq of 1 to 2048"),
    ],
)
def test_bad_ids(model, ids, message):
    with pytest.raises(ValueError, match=message):
        quantize_calibrated(model, ids, 8)


def test_a_quantized_model_is_refused(model):
    with pytest.raises(ValueError, match="already quantized"):
        quantize_calibrated(quantize(model, 8), IDS, 8)


def test_command(tmp_path, model, capsys):
    """Codes differ from those without the option, and the text is cut into windows of one size."""
    source, text, empty = tmp_path / "model", tmp_path / "text.txt", tmp_path / "empty.txt"
    model.save_pretrained(source)
    words = [f"w{number}" for number in range(61)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    text.write_text(" ".join(words[number] for number in np.tile(IDS.ravel(), 3)))
    empty.touch()
    command = ["quantize", "--model", str(source), "--bits", "4", "--group-size", "16"]
    assert main([*command, "--out", str(tmp_path / "rounded")]) == 0
    assert main([*command, "--out", str(tmp_path / "calibrated"), "--calibrate", str(text)]) == 0
    rounded, calibrated = (
        LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("rounded", "calibrated")
    )
    assert quantization_of(calibrated) == quantization_of(rounded)
    assert not np.array_equal(calibrated(NEW_IDS).logits, rounded(NEW_IDS).logits)
    capsys.readouterr()
    out = ["--out", str(tmp_path / "r")]
    for path, message in ((empty, "empty.txt is empty"), (tmp_path / "no.txt", "no.txt")):
        assert main([*command, *out, "--calibrate", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    same = tmp_path / "model" / ".." / "text.txt"
    assert main([*command, *out, "--calibrate", str(text), "--text", str(same)]) == 2
    assert "--text: is the file of --calibrate" in capsys.readouterr().err
