"""muP: the update is that of tables 3 and 8 of arXiv:2203.03466, written with multipliers in the model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM
from parity_tests.harness.cases import BASE
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.reference.tolerances import FLOAT64_BAR
from parity_tests.train.program.optimizer_definitions import newton_schulz
from parity_tests.train.program.test_optimizer import batch, named, update
from train.options import ModelOptions, OptimizerOptions, RunOptions
from train.program.build import (
    Program,
    initial_opt_state,
    initial_params,
    model_of,
    run_program,
)
from train.program.mup import Scale, base_config, mup_scales
from train.program.optimizer import make_optimizer

# 2 times the hidden size of BASE, 4 times the MLP, 2 times the heads (and 1 times those of keys), each 2
# times as wide
WIDE = BASE | {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
}
HIDDEN, INTERMEDIATE, ATTENTION, HEAD = 2, 4, 4, 2
MUP = ModelOptions(
    parametrization="mup",
    mup_base_hidden_size=32,
    mup_base_intermediate_size=44,
    mup_base_heads=4,
    mup_base_kv_heads=2,
    mup_base_head_dim=8,
)
# the width of each matrix's input, over the base's
FAN_IN = {
    "q_proj": HIDDEN,
    "k_proj": HIDDEN,
    "v_proj": HIDDEN,
    "o_proj": ATTENTION,
    "gate_proj": HIDDEN,
    "up_proj": HIDDEN,
    "down_proj": INTERMEDIATE,
}
ETA, DECAY = 3e-3, 0.1


def program_of(config: dict[str, Any], model: ModelOptions, **optimizer: Any) -> Program:
    options = RunOptions(
        model=model,
        batch_size=4,
        sequence_length=12,
        optimizer=OptimizerOptions(schedule="constant", warmup_steps=0, **optimizer),
    )
    return run_program(options, LlamaConfig.from_dict(config), jax.devices()[:1])


def by_matrix(tree: Any, factor: dict[str, float]) -> Any:
    """The tree with the leaves whose path has one of the names multiplied."""

    def scale(path: Any, leaf: Any) -> Any:
        keys = [key.key for key in path]
        return leaf * next((value for name, value in factor.items() if name in keys), 1.0)

    return jax.tree_util.tree_map_with_path(scale, tree)


@pytest.mark.parametrize("tied", [False, True])
def test_training_is_that_of_the_paper_with_multipliers(tied: bool) -> None:
    """Three steps of AdamW in float64.

    There: attention scores q k sqrt(8) / d; logits times 1/2; hidden matrices with variance 1/fan_in and
    learning rate 1/fan_in; all else, the head included, as in the narrow model (table 8).
    """
    dtypes: Any = {"parameter_dtype": "float64", "compute_dtype": "float64"}
    config = WIDE | {"tie_word_embeddings": tied, "attention_bias": True}
    rates: dict[str, Any] = {"eps": 1e-30, "clip_norm": None, "learning_rate": ETA}
    program = program_of(config, replace(MUP, **dtypes), weight_decay=DECAY, **rates)
    params = initial_params(program, 0)
    state = initial_opt_state(program, params)

    model = LlamaForCausalLM(
        LlamaConfig.from_dict(config), rngs=nnx.Rngs(params=jax.random.key(0)), dtype=jnp.float64
    )
    graphdef, standard = nnx.split(model)
    theirs = by_matrix(
        nnx.to_pure_dict(standard), {name: wider**-0.5 for name, wider in FAN_IN.items()}
    )
    one = batch()

    def logits_of(theirs: Any) -> Any:
        # 1/sqrt(d) is in the model; sqrt(8) / d = 1/sqrt(d) * sqrt(8 / d)
        scaled = by_matrix(theirs, {"q_proj": math.sqrt(8 / 16)})
        model = nnx.merge(graphdef, scaled)
        hidden = model.model(one.input_ids[0], position_ids=one.position_ids[0]).last_hidden_state
        return hidden @ model.head_weight.T / HIDDEN

    def loss(theirs: Any) -> Any:
        labels = one.labels[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits_of(theirs), np.maximum(labels, 0)
        )
        return jnp.sum(jnp.where(labels >= 0, losses, 0)) / int((labels >= 0).sum())

    def is_matrix(path: Any) -> bool:
        return path[-1].key == "weight" and "norm" not in "".join(key.key for key in path)

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def step(theirs: Any, state: Any) -> Any:
        gradient = jax.grad(loss)(theirs)
        with jax.numpy_dtype_promotion("standard"):
            direction, state = adam.update(gradient, state)
        direction = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf / next((FAN_IN[key.key] for key in path if key.key in FAN_IN), 1)
                if path[-1].key == "weight"
                else leaf
            ),
            direction,
        )
        moved = jax.tree_util.tree_map_with_path(
            lambda path, p, u: p - ETA * (u + (DECAY * p if is_matrix(path) else 0)),
            theirs,
            direction,
        )
        return moved, state

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def both_logits(params: Any, theirs: Any) -> Any:
        return model_of(program, params)(one.input_ids[0]).logits, logits_of(theirs)

    def error() -> float:
        ours, reference = both_logits(params, theirs)
        return float(jnp.max(jnp.abs(ours - reference)) / jnp.max(jnp.abs(reference)))

    lowered = program.step.lower(params, state, one, None)
    our_step = lowered.compile(compiler_options=FAST_COMPILE)
    adam = optax.scale_by_adam(0.9, 0.95, 1e-30)
    their_state = adam.init(theirs)
    assert error() <= FLOAT64_BAR
    for _ in range(3):
        params, state, _ = our_step(params, state, one, None)
        theirs, their_state = step(theirs, their_state)
    assert error() <= 1e-9  # as of trajectories in test_trajectory.py


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_at_the_base_width_the_program_is_the_standard_one(name: Any) -> None:
    """The compiled text and the initial values, bit for bit."""
    widths = replace(
        MUP, mup_base_intermediate_size=None, mup_base_kv_heads=None, mup_base_head_dim=None
    )
    texts, values = [], []
    for model in (ModelOptions(), widths):
        program = program_of(BASE, model, name=name)
        lowered = program.step.lower(program.params, program.opt_state, program.batch, None)
        texts.append(lowered.as_text())
        values.append(named(initial_params(program, 0)))
    assert texts[0] == texts[1]
    assert all(np.array_equal(values[0][name], values[1][name]) for name in values[0])


def test_muons_updates_have_the_spectral_norm_of_their_shape() -> None:
    """In proportion to sqrt(out / in), arXiv:2310.17813, from that of the narrow model on."""
    config, narrow = LlamaConfig.from_dict(WIDE), LlamaConfig.from_dict(BASE)
    scales = {name: scale.update for name, scale in mup_scales(config, narrow, "muon").items()}
    shapes = {
        ("self_attn", "q_proj"): ((128, 64), (32, 32)),
        ("self_attn", "k_proj"): ((32, 64), (16, 32)),
        ("self_attn", "o_proj"): ((64, 128), (32, 32)),
        ("mlp", "up_proj"): ((176, 64), (44, 32)),
        ("mlp", "down_proj"): ((64, 176), (32, 44)),
    }
    rng = np.random.default_rng(0)
    tree: Any = {"model": {"layers": {"self_attn": {}, "mlp": {}}}, "lm_head": {}}
    for (part, name), (shape, _) in shapes.items():
        gradient = jnp.asarray(rng.normal(size=(1, *shape)), jnp.float32)
        tree["model"]["layers"][part][name] = {"weight": gradient}
    tree["lm_head"]["weight"] = jnp.asarray(rng.normal(size=(61, 64)), jnp.float32)
    rule = make_optimizer(
        "muon",
        1.0,
        beta1=0.0,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=None,
        scales=scales,
    )
    updates = update(rule, tree, tree)
    for (part, name), ((rows, columns), (base_rows, base_columns)) in shapes.items():
        norm = 0.2 * math.sqrt(max(base_rows, base_columns))
        norm *= math.sqrt((rows / columns) / (base_rows / base_columns))
        # of the multiplier of queries, whose scores have sqrt(8) / 16 instead of 1 / sqrt(16)
        norm *= math.sqrt(8 / 16) if name == "q_proj" else 1
        gradient = np.asarray(tree["model"]["layers"][part][name]["weight"][0])
        expected = -norm * newton_schulz(gradient, 1e-8)
        actual = updates["model"]["layers"][part][name]["weight"][0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * norm)
    # the head's is Adam's, 1 in its first step
    np.testing.assert_allclose(np.abs(updates["lm_head"]["weight"]), 1 / HIDDEN, rtol=1e-3)


def test_weight_decay_does_not_depend_on_the_width() -> None:
    """Without a gradient, every matrix loses the same share."""
    layers = {"mlp": {"weight": jnp.ones((2, 4, 4))}}
    params = {"lm_head": {"weight": jnp.ones((3, 4))}, "model": {"layers": layers}}
    rule = make_optimizer(
        "adamw",
        0.1,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.5,
        clip_norm=None,
        scales={"lm_head.weight": 0.25, "model.layers.mlp.weight": 0.5},
    )
    updates = named(update(rule, jax.tree.map(jnp.zeros_like, params), params))
    for values in updates.values():
        np.testing.assert_allclose(values, -0.05, rtol=1e-6)


def test_the_base_is_in_proportion() -> None:
    """As the presets of llama-3 are: all but the key/value heads, which are given."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    )
    options = ModelOptions(parametrization="mup", mup_base_hidden_size=512)
    base = base_config(options, config)
    assert base is not None
    widths = base.hidden_size, base.intermediate_size, base.num_attention_heads, base.kv_heads
    assert (*widths, base.head_size) == (512, 1792, 4, 1, 128)
    options = replace(options, mup_base_hidden_size=1024, mup_base_head_dim=64)
    base = base_config(options, config)
    assert base is not None
    assert (base.num_attention_heads, base.kv_heads, base.head_size) == (16, 4, 64)
    assert base_config(ModelOptions(), config) is None
    scales = mup_scales(config, base, "adamw")
    assert scales["model.layers.self_attn.k_proj.weight"] == Scale(0.5, 0.25)
    assert scales["model.layers.self_attn.q_proj.weight"] == Scale(0.5**1.5, 0.25 * 0.5**0.5)
    assert "model.embed_tokens.weight" not in scales


def test_a_head_of_zeros() -> None:
    """It is updated as another; tied, it would be the embedding."""
    config, narrow = LlamaConfig.from_dict(WIDE), LlamaConfig.from_dict(BASE)
    plain, zero = (mup_scales(config, narrow, "adamw", zero_head=zero) for zero in (False, True))
    assert zero == plain | {"lm_head.weight": Scale(0.0, 1 / HIDDEN)}
    tied = LlamaConfig.from_dict(WIDE | {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match=r"^model\.mup-zero-head: found it for a model with tied"):
        mup_scales(tied, narrow, "adamw", zero_head=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mup_base_hidden_size": None}, "model.mup-base-hidden-size: found none with"),
        ({"mup_base_intermediate_size": None, "mup_base_hidden_size": 7}, "model.mup-base-inter"),
        ({"mup_base_heads": None, "mup_base_hidden_size": 7}, "model.mup-base-heads: found none"),
        ({"mup_base_heads": 3}, "model.mup-base-kv-heads: found 2, expected a divisor of the base's 3"),
        ({"mup_base_heads": 3, "mup_base_kv_heads": None}, "model.mup-base-kv-heads: found none, and"),
        ({"mup_base_head_dim": 7}, "model.mup-base-head-dim: found 7, expected an even number"),
    ],
)  # fmt: skip
def test_a_base_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        base_config(replace(MUP, **changes), LlamaConfig.from_dict(WIDE))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
