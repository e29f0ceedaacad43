"""Where and in which dtype an optimizer's state is kept: unbiased rounding, the host's memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import LlamaConfig
from parity_tests.train.program.test_optimizer_contract import OPTIONS, one_step, random_tree, tree
from parity_tests.train.runs import CONFIG
from train.options import Optimizer, OptimizerOptions, RunOptions
from train.program.build import initial_opt_state, initial_params, run_program
from train.program.optimizer import make_optimizer
from train.program.optimizer_state import kept_in, require_host_memory, round_stochastically


def floats(state: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_rounding_is_to_a_neighbour_and_unbiased() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=64) * 10.0 ** rng.integers(-20, 20, 64)).astype(np.float32)
    rounded = round_stochastically(jnp.broadcast_to(values, (4096, 64)), jax.random.key(1))
    assert rounded.dtype == jnp.bfloat16
    drawn = np.asarray(rounded, np.float64)
    toward_zero = (values.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    away = ((values.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32).astype(np.float64)
    assert np.all((drawn == toward_zero) | (drawn == away))
    # six standard errors of a mean of 4096 draws, at most half a unit in the last place
    unit = np.abs(away - toward_zero)
    assert np.all(np.abs(drawn.mean(0) - values) < 6 * unit / 2 / 64)


def test_what_bfloat16_has_is_not_rounded() -> None:
    exact = jnp.asarray([0.0, -0.0, 1.0, -3.0, 2.0**-130, jnp.inf, -jnp.inf], jnp.float32)
    rounded = round_stochastically(jnp.broadcast_to(exact, (256, 7)), jax.random.key(0))
    for row in np.asarray(rounded, np.float32):
        assert row.tobytes() == np.asarray(exact).tobytes()
    assert jnp.isnan(round_stochastically(jnp.full(256, jnp.nan), jax.random.key(0))).all()


def test_a_moment_follows_changes_below_half_of_its_last_bit() -> None:
    """With beta2 0.999 and gradients of 1 the second moment of step 1000 is 1 - 0.999^1000 = 0.632.

    Rounded to nearest it would stop at 0.125, where 0.001 of the rest is half a unit in the last place.
    """
    rule = kept_in(jnp.bfloat16, optax.scale_by_adam(b1=0.9, b2=0.999))
    ones = {"w": jnp.ones(4096)}

    def step(_: Any, state: Any) -> Any:
        return rule.update(ones, state, ones)[1]

    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(lambda start: jax.lax.fori_loop(0, 1000, step, start))(rule.init(ones))
    nu = np.asarray(state.inner.nu["w"], np.float64)
    print(f"mean {nu.mean():.4f}, deviation {nu.std():.4f}")
    assert abs(nu.mean() - (1 - 0.999**1000)) < 0.005
    assert nu.std() < 0.1
    nearest = jnp.zeros((), jnp.bfloat16)
    for _ in range(1000):
        nearest = (0.999 * nearest.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
    assert float(nearest) < 0.3


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_keeps_its_state_in_bfloat16(name: Optimizer) -> None:
    """The first update, before anything has been rounded, is that of the float32 state."""
    params, gradient = (
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), random_tree(seed))
        for seed in (0, 1)
    )
    rules = [
        make_optimizer(name, 1e-2, **OPTIONS, weight_decay=0.1, clip_norm=1.0, state_dtype=dtype)
        for dtype in (None, "bfloat16")
    ]
    wide, narrow = (one_step(rule)(params, rule.init(params), gradient) for rule in rules)
    for a, b in zip(jax.tree.leaves(wide[0]), jax.tree.leaves(narrow[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert {leaf.dtype for leaf in floats(wide[1])} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in floats(narrow[1])} == {jnp.dtype("bfloat16")}
    for a, b in zip(floats(wide[1]), floats(narrow[1]), strict=True):
        np.testing.assert_allclose(a, b.astype(jnp.float32), rtol=2**-7)


def test_a_wider_state_of_bfloat16_parameters() -> None:
    """Is computed in float32; parameters stay bfloat16."""
    params = tree(lambda *shape: jnp.ones(shape, jnp.bfloat16))
    rule = make_optimizer(
        "adamw", 1e-2, **OPTIONS, weight_decay=0.1, clip_norm=1.0, state_dtype="float32"
    )
    with jax.numpy_dtype_promotion("standard"):
        updated, state = one_step(rule)(params, rule.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in floats(state)} == {jnp.dtype("float32")}


def test_an_offloaded_state_is_in_host_memory() -> None:
    """But for the counts of steps; and it starts as the one on the device does."""
    config = LlamaConfig.from_dict(CONFIG)
    states = []
    for offload in (False, True):
        options = RunOptions(optimizer=OptimizerOptions(offload=offload))
        program = run_program(options, config, jax.devices()[:1])
        states.append(initial_opt_state(program, initial_params(program, 0)))
    for here, moved in zip(*map(jax.tree.leaves, states), strict=True):
        assert here.sharding.memory_kind == "device"
        assert moved.sharding.memory_kind == ("pinned_host" if moved.ndim else "device")
        np.testing.assert_array_equal(here, moved)


def test_a_device_without_host_memory() -> None:
    device: Any = SimpleNamespace(
        device_kind="abacus", addressable_memories=lambda: [SimpleNamespace(kind="device")]
    )
    with pytest.raises(ValueError) as caught:
        require_host_memory(device, "optimizer.offload")
    assert str(caught.value) == (
        "optimizer.offload: abacus can use device memory, but no pinned_host; leave it out"
    )
    require_host_memory(jax.devices()[0], "optimizer.offload")
