"""Weights in 8 and 4 bits: error bounds, directories, everything that a model does, quality."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
from llama_jax import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    dequantize,
    quantize,
)
from llama_jax.__main__ import main
from llama_jax.evaluation.divergence import divergence
from llama_jax.evaluation.scoring import token_scores
from llama_jax.quantization.model import (
    Quantization,
    matrices_by_bits,
    quantization_of,
    weight_bytes,
)
from llama_jax.quantization.weight import (
    QuantizedWeight,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
)
from llama_jax.text.tokenizer import load_tokenizer
from parity_tests.harness import demo_checkpoint
from parity_tests.harness.child_process import ROOT

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    attention_bias=True,
    pad_token_id=0,
)
IDS = np.asarray([[5, 9, 2, 60, 7, 33], [1, 2, 3, 4, 5, 6]], np.int32)
# 16 does not divide 24 columns: those matrices have 8 bits and a scale per row
KINDS = [(8, None), (8, 8), (8, 16), (4, 8), (4, 16)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)


def _heavy_tailed(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_t(3, (3, 64)) * np.exp(2 * generator.normal(size=(3, 1)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31).map(_heavy_tailed),
    st.sampled_from([2, 32]),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_error_bounds(values, width, dtype):
    weight = jnp.asarray(values, dtype)
    exact = np.asarray(weight, np.float64)
    rounding = float(jnp.finfo(dtype).eps) * np.abs(exact).max(-1, keepdims=True)
    codes, scale = jax.jit(quantize_int8)(weight)
    restored = dequantize_int8(codes, scale)
    assert restored.dtype == dtype
    half_step = np.abs(exact).max(-1, keepdims=True) / 254
    error = np.abs(np.asarray(restored, np.float64) - exact)
    assert (error <= half_step + 2 * rounding).all()

    groups = exact.reshape(len(exact), -1, width)
    restored = dequantize_int8(*jax.jit(quantize_int8, static_argnums=1)(weight, width))
    half_step = np.abs(groups).max(-1, keepdims=True) / 254
    error = np.abs(np.asarray(restored, np.float64) - groups)
    assert (error <= half_step + 2 * rounding[..., None]).all()

    restored = dequantize_int4(*jax.jit(quantize_int4, static_argnums=1)(weight, width))
    assert restored.dtype == dtype
    assert restored.shape == weight.shape
    error = np.asarray(restored, np.float64).reshape(groups.shape) - groups
    # no worse than the same codes over the full range of each group
    step = np.ptp(groups, axis=-1, keepdims=True) / 15
    codes = np.round((groups - groups.min(-1, keepdims=True)) / np.where(step == 0, 1, step))
    full_range = codes * step + groups.min(-1, keepdims=True) - groups
    slack = width * (4 * rounding[..., None] ** 2 + 4 * rounding[..., None] * step)
    assert (np.square(error).sum(-1) <= np.square(full_range).sum(-1) + slack[..., 0]).all()


def test_equal_values_and_zeros_are_exact():
    weight = jnp.asarray([[0.0] * 8, [0.5] * 8, [-3.0] * 8])
    assert np.array_equal(dequantize_int4(*quantize_int4(weight, 4)), weight)
    assert np.array_equal(dequantize_int8(*quantize_int8(jnp.zeros((2, 8)))), np.zeros((2, 8)))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_dequantized_model(model, kind):
    quantized = quantize(model, *kind)
    plain = dequantize(quantized)
    assert quantization_of(plain) is None
    assert quantization_of(model) is None
    expected = plain(IDS, labels=IDS)
    out = jax.jit(lambda model: model(IDS, labels=IDS))(quantized)
    np.testing.assert_allclose(out.logits, expected.logits, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(out.loss, expected.loss, rtol=1e-5)
    assert not np.array_equal(out.logits, model(IDS).logits)
    scored, scored_plain = (token_scores(m, IDS.tolist()) for m in (quantized, plain))
    np.testing.assert_allclose(scored[0].log_probs, scored_plain[0].log_probs, rtol=1e-4)


def test_generates(model):
    quantized = quantize(model, 4, 16)
    tokens = quantized.generate(IDS, max_new_tokens=6)
    assert np.array_equal(tokens, dequantize(quantized).generate(IDS, max_new_tokens=6))


def test_bits_of_each_matrix(model):
    quantized = quantize(model, 4, 16)
    assert quantization_of(quantized) == Quantization(4, 16)
    # only down_proj has an input dimension (32) that 16 divides
    assert matrices_by_bits(quantized) == {4: 2, 8: 2 * 6 + 1}
    layers = quantized.model.layers
    assert layers.mlp.down_proj.weight.codes.shape == (2, 24, 2, 8)
    assert layers.mlp.up_proj.weight.codes.dtype == jnp.int8
    assert matrices_by_bits(quantize(model, 4, 8)) == {4: 2 * 7, 8: 1}
    eight_bits = quantize(model, 8, 8)
    assert quantization_of(eight_bits) == Quantization(8, 8)
    assert eight_bits.model.embed_tokens.weight.codes.shape == (61, 3, 8)
    assert matrices_by_bits(eight_bits) == {4: 0, 8: 2 * 7 + 1}
    # of 24 and 32 columns, 16 divides 32 only
    assert quantize(model, 8, 16).model.embed_tokens.weight.codes.shape == (61, 24)


def test_memory(model):
    projections = 2 * (24 * (24 + 12 + 12 + 24) + 3 * 24 * 32)
    rest = 4 * (2 * (2 * 24 + 24 + 12 + 12 + 24) + 24)  # norms and biases
    assert weight_bytes(model) == 4 * (projections + 61 * 24) + rest
    rows = 2 * (24 + 12 + 12 + 24 + 32 + 32 + 24)
    assert weight_bytes(quantize(model, 8)) == projections + 4 * rows + 61 * (24 + 4) + rest
    scales = (projections + 61 * 24) // 8 * 4
    assert weight_bytes(quantize(model, 8, 8)) == projections + 61 * 24 + scales + rest
    grouped = projections // 2 + projections // 8 * 2 * 4
    assert weight_bytes(quantize(model, 4, 8)) == grouped + 61 * (24 + 4) + rest


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_bitwise(tmp_path, kind, dtype):
    quantized = quantize(LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(1), dtype=dtype), *kind)
    quantized.save_pretrained(tmp_path / "q")
    fields = json.loads((tmp_path / "q" / "config.json").read_text())
    expected = {"quantized_by": "llama_jax", "bits": kind[0], "group_size": kind[1]}
    assert fields["quantization_config"] == expected
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "q")
    assert quantization_of(loaded) == quantization_of(quantized)
    assert replace(loaded.config, extra_fields={}) == quantized.config
    assert loaded.dtype == dtype
    paths = zip(
        nnx.to_flat_state(nnx.state(loaded)), nnx.to_flat_state(nnx.state(quantized)), strict=True
    )
    for (name, a), (other, b) in paths:
        assert name == other
        assert a.get_value().dtype == b.get_value().dtype
        assert np.asarray(a.get_value()).tobytes() == np.asarray(b.get_value()).tobytes(), name


def test_task_heads(tmp_path):
    model = LlamaForSequenceClassification(CONFIG, rngs=nnx.Rngs(2))
    quantized = quantize(model, 4, 8)
    assert isinstance(quantized.score.weight, nnx.Param)
    assert isinstance(quantized.model.embed_tokens.weight, QuantizedWeight)
    expected = dequantize(quantized)(IDS).logits
    quantized.save_pretrained(tmp_path / "q")
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path / "q")
    np.testing.assert_allclose(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-6)


def test_an_id_outside_the_vocabulary_is_nan(model):
    quantized = quantize(model, 8)
    rows = jax.jit(lambda ids: quantized.model.embed_tokens(ids))(jnp.asarray([[3, 99, -1]]))
    assert np.isfinite(rows[0, 0]).all()
    assert np.isnan(rows[0, 1:]).all()


def test_divergence(model):
    same = divergence(model, model, IDS.reshape(-1), window=6)
    assert same.tokens == 10
    assert same.kl == 0
    quantized = quantize(model, 4, 8)
    measured = divergence(model, quantized, IDS.reshape(-1), window=6)
    logs = [np.asarray(jax.nn.log_softmax(m(IDS).logits)) for m in (model, quantized)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)[:, :-1]
    np.testing.assert_allclose(measured.kl, kl.mean(), rtol=1e-3)
    targets = IDS[:, 1:, None]
    chosen = [np.take_along_axis(log[:, :-1], targets, -1).mean() for log in logs]
    perplexities = measured.reference_perplexity, measured.perplexity
    np.testing.assert_allclose(perplexities, np.exp([-c for c in chosen]), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 128), "bits: found 3, expected 8 or 4"),
        ((True, 128), "bits: found True"),
        ((4, 0), "group_size: found 0, expected a positive even number"),
        ((8, 128), "group_size: found 128"),
        ((4, 7), "group_size: found 7"),
        (
            (4, 128),
            "group_size: found 128, expected a divisor of one of the input dimensions 24, 32",
        ),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(model, *arguments)


def test_a_quantized_model_is_not_quantized_again(model):
    with pytest.raises(ValueError, match="already quantized"):
        quantize(quantize(model, 8), 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "quantization_config: bits: found 3"),
        ({"bits": 4, "group_size": 0}, "quantization_config: group_size: found 0"),
        ({"bits": 4, "group_size": 8}, "model.layers.0.mlp.down_proj.weight.zero: missing"),
        (
            {"quantized_by": "other", "quant_method": "awq"},
            r"quantization_config: the weights are quantized \(awq, 8 bits\)",
        ),
        (None, "found quantized weights"),
    ],
)
def test_a_config_that_does_not_match(tmp_path, model, change, message):
    quantize(model, 8).save_pretrained(tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    fields = json.loads(path.read_text())
    if change is None:
        del fields["quantization_config"]
    else:
        fields["quantization_config"] |= change
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as error:
        LlamaForCausalLM.from_pretrained(tmp_path / "q")
    assert "\n" not in str(error.value)


def test_command(tmp_path, model, capsys):
    source, out = str(tmp_path / "m"), str(tmp_path / "q")
    model.save_pretrained(source)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert main(["quantize", "--model", source, "--bits", "8", "--out", out]) == 0
    before, after = weight_bytes(model), weight_bytes(quantize(model, 8))
    said = capsys.readouterr().out
    assert f"{before} bytes of weights before, {after} after" in said
    assert quantization_of(LlamaForCausalLM.from_pretrained(out)) == Quantization(8, None)
    for arguments, message in (
        (["--model", out, "--out", str(tmp_path / "r")], "already quantized"),
        (["--model", source, "--out", out], "already exists; choose another directory"),
        (["--model", source, "--out", str(tmp_path / "r"), "--bits", "3"], "--bits: found 3"),
        (
            ["--model", source, "--out", str(tmp_path / "r"), "--text", str(empty)],
            "empty.txt is empty",
        ),
        (
            ["--model", source, "--out", str(empty / "r")],
            "empty.txt is a file, expected a directory",
        ),
    ):
        assert main(["quantize", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not Path(tmp_path / "r").exists()


@pytest.mark.checkpoint
def test_checkpoint(tmp_path):
    directory = tmp_path / "model"
    convert.convert(demo_checkpoint.fetch(), directory)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=jnp.float32)
    text = (ROOT / "LICENSE").read_text()
    ids = load_tokenizer(directory).encode(text).ids[:512]
    assert divergence(model, quantize(model, 8), ids).kl < 2e-2
    # converted from a GGUF file with 4 bits in groups of 32: the search recovers its codes
    weight = model.model.layers.mlp.down_proj.weight[...][3]
    error = dequantize_int4(*quantize_int4(weight, 32)) - weight
    assert jnp.linalg.norm(error) < 1e-3 * jnp.linalg.norm(weight)
