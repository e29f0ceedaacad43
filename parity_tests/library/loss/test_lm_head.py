"""LM heads: outputs, parameter counts and losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import (
    LlamaConfig,
    LlamaForCausalLM,
    LMHeadConfig,
    LMOutputWithLoss,
    normalize_rows,
)
from llama_jax.models.lm_head import RMSNormConfig
from parity_tests.reference.errors import relative_error

D, V = 16, 29
X = np.random.default_rng(0).normal(size=(2, 5, D))
LABELS = jnp.asarray([[1, 2, -100, 28, 0], [5, -100, 3, 3, 7]])
CONFIGS = {
    "default": LMHeadConfig(),
    "no_bias": LMHeadConfig(bias=False),
    "norm": LMHeadConfig(layer_norm=RMSNormConfig(eps=1e-5)),
    "normalized": LMHeadConfig(name="normalized"),
}


def build(name, implementation="default", dtype="float32"):
    from dataclasses import replace

    config = replace(CONFIGS[name], loss_implementation=implementation, dtype=dtype)
    head = config.build(d_model=D, vocab_size=V, rngs=nnx.Rngs(0), stddev=0.5)
    if hasattr(head, "bias"):
        head.bias = nnx.Param(jnp.linspace(-1, 1, V, dtype=head.bias.dtype))
    return config, head


@pytest.mark.parametrize("name", CONFIGS)
def test_num_params_matches_the_built_head(name):
    config, head = build(name)
    assert config.num_params(D, V) == sum(leaf.size for leaf in jax.tree.leaves(head))


def test_the_default_has_a_bias_and_the_normalized_head_a_scale():
    assert LMHeadConfig().num_params(D, V) == D * V + V
    assert LMHeadConfig(bias=False).num_params(D, V) == D * V
    assert LMHeadConfig(name="normalized").num_params(D, V) == D * V + V
    assert LMHeadConfig(layer_norm=RMSNormConfig()).num_params(D, V) == D * V + V + D


def plain_logits(name, head, x):
    if name == "norm":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(head.norm.weight[...])
    logits = x @ np.asarray(head.weight[...]).T
    if name == "normalized":
        return logits * np.asarray(head.sz[...]) * np.sqrt(D)
    return logits + np.asarray(head.bias[...]) if hasattr(head, "bias") else logits


@pytest.mark.parametrize("implementation", ["default", "fused_linear"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_losses_match_the_plain_formula(name, implementation):
    with jax.enable_x64(True):
        _, head = build(name, implementation, "float64")
        logits = plain_logits(name, head, X)
        assert relative_error(np.asarray(head(jnp.asarray(X))), logits) <= 1e-13
        out = head(jnp.asarray(X), labels=LABELS, z_loss_multiplier=0.1, loss_div_factor=2.0)
        assert isinstance(out, LMOutputWithLoss)
        lse = np.log(np.exp(logits).sum(-1))
        valid = np.asarray(LABELS) != -100
        chosen = np.take_along_axis(logits, np.where(valid, LABELS, 0)[..., None], -1)[..., 0]
        np.testing.assert_allclose(out.ce_loss, (lse - chosen)[valid].mean() / 2, rtol=1e-12)
        np.testing.assert_allclose(out.z_loss, 0.1 * (lse[valid] ** 2).mean() / 2, rtol=1e-12)
        np.testing.assert_allclose(out.loss, out.ce_loss + out.z_loss, rtol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_implementations_have_the_same_gradients(name):
    with jax.enable_x64(True):
        gradients = []
        for implementation in ("default", "fused_linear"):
            _, head = build(name, implementation, "float64")
            loss = lambda head, x: head(x, labels=LABELS, z_loss_multiplier=0.1).loss  # noqa: E731
            gradients.append(jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(head, jnp.asarray(X))))
        for ours, theirs in zip(*gradients, strict=True):
            assert relative_error(np.asarray(ours), np.asarray(theirs)) <= 1e-12


def test_which_outputs_are_returned_with_a_loss():
    x = jnp.asarray(X, jnp.float32)
    for implementation, default in (("default", True), ("fused_linear", False)):
        _, head = build("default", implementation)
        assert (head(x, labels=LABELS).logits is not None) == default
        assert head(x, labels=LABELS, return_logits=True).logits.shape == (2, 5, V)
        assert head(x, labels=LABELS, return_logits=False).logits is None
        assert head(x, labels=LABELS).z_loss is None
        assert head(x, labels=LABELS, z_loss_multiplier=0.0).z_loss is None
        with pytest.raises(ValueError, match="return_logits: found False"):
            head(x, return_logits=False)


def test_logits_to_keep_selects_the_same_positions_of_hidden_states_and_labels():
    x = jnp.asarray(X, jnp.float32)
    _, head = build("norm", "fused_linear")
    full = head(x, labels=LABELS, loss_reduction="none").loss
    last = head(x, labels=LABELS, loss_reduction="none", logits_to_keep=2).loss
    np.testing.assert_allclose(last, full[:, -2:], rtol=1e-5)
    picked = jnp.asarray([[0, 3], [4, 2]])
    some = head(x, labels=LABELS, loss_reduction="none", logits_to_keep=picked).loss
    np.testing.assert_allclose(some, np.take_along_axis(full, picked, 1), rtol=1e-5)
    assert head(x, logits_to_keep=picked).shape == (2, 2, V)


def test_rows_of_the_normalized_head_have_length_one():
    _, head = build("normalized")
    lengths = jnp.linalg.norm(head.weight[...], axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    np.testing.assert_allclose(head.sz[...] * np.sqrt(D), 1, rtol=1e-6)
    scaled = normalize_rows(head.weight[...] * jnp.linspace(1, 9, V)[:, None])
    np.testing.assert_allclose(scaled, head.weight[...], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "other"}, "name: found 'other'"),
        ({"loss_implementation": "liger"}, "loss_implementation: found 'liger'"),
        ({"name": "normalized", "bias": True}, "bias: found True"),
        ({"name": "normalized", "layer_norm": RMSNormConfig()}, "layer_norm: found"),
    ],
)
def test_a_bad_head(fields, message):
    with pytest.raises(ValueError, match=message):
        LMHeadConfig(**fields)


@pytest.mark.parametrize("tied", [False, True])
def test_the_causal_model_never_holds_the_logits_of_a_loss(tied):
    """Asking only for the loss, forward and gradient, compiles to no [tokens, vocab] buffer, and a tied
    embedding is not transposed."""
    config = LlamaConfig(
        vocab_size=5003,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
    for function in (lambda m, i: m(i, labels=i).loss, jax.grad(lambda m, i: m(i, labels=i).loss)):
        text = jax.jit(function).lower(model, ids).compile().as_text()
        for shape in ("4,1024,5003", "4096,5003", "5003,4096"):
            assert f"f32[{shape}]" not in text
        assert "f32[32,5003]" not in text
