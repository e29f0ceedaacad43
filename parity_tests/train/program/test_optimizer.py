"""Optimizers by name: they reduce the loss, decay matrices only, and clip; muon is as published."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.tree_util import keystr

from llama_jax import LlamaConfig, LlamaForCausalLM
from parity_tests.harness.cases import BASE
from parity_tests.harness.compilation import FAST_COMPILE
from train.data.batch import Batch
from train.options import Optimizer
from train.program.optimizer import decay_mask, make_optimizer
from train.program.step import make_step

CONFIG = BASE | {"attention_bias": True, "mlp_bias": True}
RATES = {"adamw": 1e-2, "muon": 1e-2, "lion": 3e-3, "adafactor": 0.3, "sgd": 0.3}
OPTIONS: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}


def params_of(dtype: Any = jnp.float32) -> tuple[Any, Any]:
    model = LlamaForCausalLM(LlamaConfig.from_dict(CONFIG), rngs=nnx.Rngs(0), dtype=dtype)
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def batch(micro: int = 1, rows: int = 4, length: int = 12) -> Batch:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG["vocab_size"], (micro, rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    labels = np.roll(ids, -1, -1)
    labels[..., -1] = -100
    return Batch(ids, labels, np.zeros_like(ids), positions)


def named(tree: Any) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in flat}


def update(rule: Any, gradients: Any, params: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        state = rule.init(params)
        return jax.jit(rule.update)(gradients, state, params)[0]


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_the_loss_falls(name: Optimizer) -> None:
    graphdef, params = params_of()
    rule = make_optimizer(name, RATES[name], **OPTIONS)
    step = jax.jit(
        make_step(graphdef, rule, compute_dtype=jnp.float32, z_loss=0.0),
        compiler_options=FAST_COMPILE,
    )
    opt_state, one_batch, losses = rule.init(params), batch(), []
    for _ in range(12):
        params, opt_state, metrics = step(params, opt_state, one_batch, None)
        losses.append(float(metrics.loss))
    print(name, losses[0], losses[-1])
    assert losses[-1] < 0.8 * losses[0]


def test_matrices_decay() -> None:
    _, params = params_of()
    mask = {name: bool(value) for name, value in named(decay_mask(params)).items()}
    decaying = {name.removeprefix("model.layers.") for name, decays in mask.items() if decays}
    assert decaying == {
        *("model.embed_tokens.weight", "lm_head.weight"),
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    assert len(mask) == len(decaying) + 3 + 7  # norms and biases


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_only_masked_parameters_decay(name: Optimizer) -> None:
    """Without a gradient only decay moves a parameter."""
    _, params = params_of()
    params = jax.tree.map(lambda leaf: leaf + 0.5, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved = named(update(make_optimizer(name, 1e-2, **OPTIONS), zeros, params))
    expected = named(decay_mask(params))
    assert {path: bool(np.any(value != 0)) for path, value in moved.items()} == {
        path: bool(value) for path, value in expected.items()
    }


def test_clipping_is_by_the_global_norm() -> None:
    _, params = params_of()
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), params)
    options = OPTIONS | {"weight_decay": 0.0, "beta1": 0.0}
    clipped = named(update(make_optimizer("sgd", 1.0, **options), gradients, params))
    unclipped = named(
        update(make_optimizer("sgd", 1.0, **options | {"clip_norm": None}), gradients, params)
    )
    norm = np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in clipped.values()))
    assert abs(norm - 1) < 1e-5
    ratios = [clipped[name] / unclipped[name] for name in unclipped]
    assert np.ptp(np.concatenate([ratio.ravel() for ratio in ratios])) < 1e-6
    assert all((value == -0.5).all() for value in unclipped.values())


def test_muon_orthogonalizes_the_momentum_of_every_layers_matrices() -> None:
    """Against Keller Jordan's iteration in numpy, matrix by matrix; AdamW updates everything else."""
    _, params = params_of()
    rng = np.random.default_rng(1)
    gradients = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params
    )
    options = OPTIONS | {"weight_decay": 0.0, "clip_norm": None}
    updates = named(update(make_optimizer("muon", 1.0, **options), gradients, params))
    adamw = optax.adamw(1.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    adam = named(update(adamw, gradients, params))
    matrices = 0
    for name, gradient in named(gradients).items():
        if ".layers." not in name or gradient.ndim != 3:
            np.testing.assert_allclose(updates[name], adam[name], rtol=1e-5, err_msg=name)
            continue
        for layer, matrix in enumerate(gradient):
            scale = 0.2 * np.sqrt(max(matrix.shape))
            expected = -scale * newton_schulz(matrix)
            np.testing.assert_allclose(updates[name][layer], expected, atol=2e-3 * scale)
            # nearly orthogonal: singular values are near 1, unless they were near 0
            values = np.linalg.svd(updates[name][layer] / scale, compute_uv=False)
            assert 0.7 < np.median(values) <= values.max() < 1.25, name
            matrices += 1
    assert matrices == 7 * CONFIG["num_hidden_layers"]


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five steps of the quintic; the Nesterov momentum of a first gradient is a multiple of it."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.astype(np.float64)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError) as caught:
        make_optimizer("adam", 1e-3, **OPTIONS)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "optimizer: found 'adam', expected adamw, muon, lion, adafactor or sgd"
    )
