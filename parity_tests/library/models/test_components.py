"""Norm, rotary embedding, attention, MLP and one decoder layer, each checked by itself.

In float64 against the oracle, module by module on the oracle's inputs; in float32 against Hugging
Face's own module, whose distance from the oracle ours may not exceed. Rule P4 of docs/parity.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_jax import LlamaConfig
from llama_jax.attention.plain import dot_product_attention
from llama_jax.models import layers
from llama_jax.numerics import activations, rope
from parity_tests.harness.cases import BY_NAME, ROPES, Case, hf_config, inputs_of, weights_of
from parity_tests.reference import oracle
from parity_tests.reference.errors import relative_error, rms_error
from parity_tests.reference.tolerances import FLOAT64_BAR, ROUNDING_RATIO
from parity_tests.report.walk import drifts

# Between them every module in every form; the rotary types follow below, one by one.
MODULES = [
    "gqa_3_to_1",
    "mqa",
    "head_dim_wider",
    "attention_bias",
    "mlp_bias",
    "pretraining_tp",
    "tied",
    "embeds",
    "mask_holes",
    "segments_and_padding",
    "positions_scattered",
    "num_items",
    "everything",
]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_equals_the_oracle(name: str) -> None:
    case = BY_NAME[name]
    errors = drifts(case.config, weights_of(case.config), inputs_of(case.inputs, case.config))
    assert {n for n, error in errors.items() if not error <= FLOAT64_BAR} == set()


@pytest.mark.parametrize("name", sorted(oracle.ACTIVATIONS))
def test_activations(name: str) -> None:
    """Wide enough for the tails: saturation, cancellation, the corners of the clipped ones."""
    x = np.concatenate([np.linspace(-30, 30, 601), [-3, 3, -10, 10, 6, 1e-8, -1e-8]])
    points = torch.from_numpy(x).requires_grad_()
    want = oracle.ACTIVATIONS[name](points)
    (slope,) = torch.autograd.grad(want.sum(), points)
    with jax.enable_x64(True):
        got, pullback = jax.vjp(activations.ACTIVATIONS[name], jnp.asarray(x))
        (our_slope,) = pullback(jnp.ones_like(got))
    assert relative_error(got, want) <= FLOAT64_BAR
    corners = np.isin(x, [-10, -3, 0, 3, 6, 10])  # two programs may choose either side's slope
    assert relative_error(np.asarray(our_slope)[~corners], slope[~corners]) <= FLOAT64_BAR


def test_activations_are_complete() -> None:
    assert set(activations.ACTIVATIONS) >= set(oracle.ACTIVATIONS)


# Rotary embeddings -------------------------------------------------------------------------------


def our_cos_sin(case: Case, positions: np.ndarray, dtype: jnp.dtype) -> list[jax.Array]:
    """Ours at [B, T, D], for an oracle of the same shape."""
    config = LlamaConfig.from_dict(case.config)
    tables = rope.rope_cos_sin(
        jnp.asarray(positions, jnp.int32),
        config.rope,
        config.head_size,
        config.max_position_embeddings,
        dtype,
    )
    return [jnp.concatenate([table, table], axis=-1) for table in tables]


# Around the contexts of the cases (16, 32, 64), and far beyond all of them.
LAST_POSITIONS = [0, 14, 15, 16, 31, 32, 63, 64, 9000]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", ROPES, ids=repr)
def test_cos_and_sin(case: Case, jit: bool) -> None:
    """At every length around the original context, where `dynamic` and `longrope` change."""

    def tables(positions: np.ndarray) -> list[jax.Array]:
        return our_cos_sin(case, positions, jnp.dtype("float64"))

    tables = jax.jit(tables) if jit else tables
    with jax.enable_x64(True):
        for last in LAST_POSITIONS:
            # The longest position is in the first row: the second must turn with it.
            positions = np.array([[0, last // 2, last], [0, last // 3, last // 4]])
            want = oracle.cos_sin(case.config, torch.from_numpy(positions))
            got = tables(positions)
            for ours, theirs in zip(got, want, strict=True):
                assert relative_error(ours, theirs) <= FLOAT64_BAR, f"last position {last}"


@pytest.mark.parametrize("last", [range(16, 64), range(5000, 9000, 97)], ids=["near", "far"])
@pytest.mark.parametrize("case", ROPES, ids=repr)
def test_cos_and_sin_in_float32(case: Case, last: range) -> None:
    """Pooled over lengths, since `dynamic` has other frequencies, and other luck, at each."""
    run = jax.jit(lambda positions: our_cos_sin(case, positions, jnp.dtype("float32")))
    ours, theirs, truth = [], [], []
    for longest in last:
        positions = np.linspace(0, longest, 64).astype(np.int64)[None]
        truth += oracle.cos_sin(case.config, torch.from_numpy(positions))
        theirs += LlamaRotaryEmbedding(hf_config(case.config))(
            torch.zeros(1), torch.from_numpy(positions)
        )
        ours += run(positions)
    assert rms_error(ours, truth) <= ROUNDING_RATIO * rms_error(theirs, truth)


@pytest.mark.parametrize("case", ROPES, ids=repr)
def test_inverse_frequencies_and_factor(case: Case) -> None:
    config = LlamaConfig.from_dict(case.config)
    for last in LAST_POSITIONS:
        want, factor = oracle.inverse_frequencies(case.config, last + 1)
        got, our_factor = rope.inverse_frequencies(
            config.rope, config.head_size, config.max_position_embeddings, last + 1
        )
        assert relative_error(got, want) <= FLOAT64_BAR
        assert our_factor == pytest.approx(factor, rel=1e-15)


def test_rotary_cases_differ() -> None:
    """Else a variant could be ignored and no test would notice."""
    tables = {
        case.name: (*frequencies.tolist(), factor)
        for case in ROPES
        for frequencies, factor in [oracle.inverse_frequencies(case.config, 40)]
        if oracle.head_dim(case.config) == 16
    }
    alike = (
        {"rope_dynamic_within", "rope_dynamic_past"},
        {
            "rope_longrope_short",
            "rope_longrope_long",
        },
    )  # one config at two lengths
    for pair in alike:
        tables.pop(min(pair))
    assert len(set(tables.values())) == len(tables)


def test_rotate_turns_by_the_angle() -> None:
    """Rotating by a, then by b, is rotating by a + b; and it keeps lengths."""
    case = BY_NAME["gqa_2_to_1"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 3, 8)), jnp.float32)
    one, other = np.array([[0, 1, 2, 3, 4]]), np.array([[7, 0, 3, 11, 2]])
    half = [
        [t[..., :4] for t in our_cos_sin(case, p, jnp.dtype("float32"))]
        for p in (one, other, one + other)
    ]
    twice = layers.rotate(layers.rotate(x, *half[0]), *half[1])
    np.testing.assert_allclose(twice, layers.rotate(x, *half[2]), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(twice, axis=-1), jnp.linalg.norm(x, axis=-1), 1e-5)


# What a query which sees nothing does ------------------------------------------------------------


def test_a_query_without_keys_gives_zeros() -> None:
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 3, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, 3, 2, 8)), jnp.float32) for _ in range(2))
    mask = jnp.array([[[[False] * 3, [False, True, False], [True, True, True]]]])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return dot_product_attention(q, k, v, mask, 0.0, None)

    out, probabilities = attend(q, k, v)
    assert not out[:, 0].any()
    assert not probabilities[:, :, 0].any()
    assert bool((out[:, 1] == jnp.repeat(v[:, 1], 2, axis=1)).all())
    gradients = jax.grad(lambda *a: jnp.square(attend(*a)[0]).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    assert not gradients[0][:, 0].any()
