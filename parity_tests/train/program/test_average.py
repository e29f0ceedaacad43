"""The average of parameters, against optax.ema and torch's AveragedModel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from train.options import GuardOptions
from train.program.average import averaged
from train.program.guard import guarded

STEPS = 40


def trajectory(decay: float, dtype: Any) -> tuple[list[np.ndarray], Any]:
    """The parameters after each step of sgd, and the average after the last."""
    rule = averaged(optax.with_extra_args_support(optax.sgd(0.3)), decay)
    rng = np.random.default_rng(0)
    params: Any = {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype)}
    state: Any = rule.init(params)
    seen, update = [], jax.jit(rule.update)
    for _ in range(STEPS):
        gradients = {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype)}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["w"], np.float64))
    return seen, state.average["w"]


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.9999999])
@pytest.mark.parametrize(
    ("dtype", "kept", "error"),
    [("float64", "float64", 1e-8), ("float32", "float32", 1e-5), ("bfloat16", "float32", 1e-5)],
)
def test_it_is_optaxs_ema_without_its_bias(
    decay: float, dtype: str, kept: str, error: float
) -> None:
    with jax.enable_x64(True):
        seen, actual = trajectory(decay, jnp.dtype(dtype))
        assert actual.dtype == jnp.dtype(kept)
        reference = optax.ema(decay, debias=True)
        state: Any = reference.init(jnp.zeros((3, 4), jnp.float64))
        with jax.numpy_dtype_promotion("standard"):
            for value in seen:
                expected, state = reference.update(jnp.asarray(value), state)
    np.testing.assert_allclose(actual, expected, rtol=error, atol=error)


def test_it_is_torchs_without_the_part_of_its_first_parameters() -> None:
    """torch begins with the first parameters as if all earlier steps had had them too."""
    decay = 0.9
    with jax.enable_x64(True):
        seen, actual = trajectory(decay, jnp.float64)
    layer = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
    model = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for value in seen:
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(value.copy()))
        model.update_parameters(layer)
    earlier = decay**STEPS
    theirs = model.module.weight.detach().numpy()
    np.testing.assert_allclose(actual, (theirs - earlier * seen[0]) / (1 - earlier), rtol=1e-10)


def test_a_step_that_is_left_out_has_no_part_in_it() -> None:
    rule = guarded(
        averaged(optax.with_extra_args_support(optax.sgd(0.1)), 0.9), GuardOptions(non_finite=1)
    )
    params = {"w": jnp.ones(3)}
    state: Any = rule.init(params)
    for gradient in (1.0, np.nan, 2.0):
        gradients = {"w": jnp.full(3, gradient)}
        updates, state = rule.update(gradients, state, params, loss=jnp.float32(1))
        params = optax.apply_updates(params, updates)
    assert int(state.inner.steps) == 2
    # parameters 0.9 and 0.7, with weights 0.9 and 1 over 1.9
    np.testing.assert_allclose(state.inner.average["w"], (0.9 * 0.9 + 0.7) / 1.9, rtol=1e-6)
