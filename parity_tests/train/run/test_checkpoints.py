"""Checkpoints: fingerprints, what is refused, what is kept."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.checkpoints.fingerprint import fingerprint, fingerprint_on_host
from train.checkpoints import (
    fingerprints,
    open_manager,
    restore,
    save,
    wait,
)
from train.program.optimizer import decay_mask, make_optimizer


def prints(*arrays: Any) -> list[int]:
    return [int(number) for number in fingerprints([jnp.asarray(a) for a in arrays])]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_two_swapped_values_are_noticed(data: st.DataObject) -> None:
    """Values that differ in one bit, at indices any power of two apart."""
    values = np.ones(1024, np.float32).reshape(2, 512)
    first, second = data.draw(st.lists(st.integers(0, 1023), min_size=2, max_size=2, unique=True))
    values.flat[first] = 2.0 ** data.draw(st.integers(1, 8))
    swapped = values.copy()
    swapped.flat[first], swapped.flat[second] = values.flat[second], values.flat[first]
    assert prints(values) != prints(swapped)


@settings(max_examples=40, deadline=None)
@given(index=st.integers(0, 23), bit=st.integers(0, 31))
def test_a_flipped_bit_is_noticed(index: int, bit: int) -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    flipped = values.copy()
    flipped.view(np.uint32).flat[index] ^= np.uint32(1 << bit)
    assert prints(values) != prints(flipped)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8"])
def test_every_dtype(dtype: str) -> None:
    values = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    other = values.copy()
    other[1, 2] = 9
    assert prints(values) == prints(values.copy())
    assert prints(values) != prints(other)
    assert prints(values[0, 1]) != prints(values[0, 2])


def test_float64() -> None:
    with jax.enable_x64(True):
        values = np.random.default_rng(0).normal(size=(2, 3))
        other = values.copy()
        other[0, 0] = np.nextafter(other[0, 0], 9)
        assert prints(values) == prints(values.copy())
        assert prints(values) != prints(other)


def tree(value: float) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    return {"a": jnp.full(3, value)}, {"m": jnp.zeros(3), "count": jnp.zeros((), jnp.int32)}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    manager = open_manager(tmp_path, keep_last=2, keep_every=None)
    save(manager, 1, *tree(1.0), {})
    wait(manager)
    params, opt_state = tree(1.0)
    for wrong in (tree(value), (params, opt_state | {"m": jnp.full(3, value)})):
        with pytest.raises(ValueError) as caught:
            save(manager, 2, *wrong, {})
        assert str(caught.value).startswith("step 2: found parameters or optimizer state that are")
    assert list(manager.all_steps()) == [1]
    manager.close()


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 11):
        save(manager, step, *tree(float(step)), {})
    wait(manager)
    assert sorted(manager.all_steps()) == [4, 8, 9, 10]
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree(0.0)
    )
    restored = restore(manager, *abstract, step=4)
    assert restored is not None
    assert (restored.step, float(restored.params["a"][0])) == (4, 4.0)
    with pytest.raises(ValueError) as caught:
        restore(manager, *abstract, step=5)
    assert str(caught.value) == "step: found 5, expected one of 4, 8, 9, 10"
    manager.close()


def old_sgd(rate: Any) -> Any:
    """Decay before the momentum."""
    decay = optax.add_decayed_weights(0.1, mask=decay_mask)
    return optax.chain(decay, optax.sgd(rate, momentum=0.9))


def old_adafactor(rate: Any) -> Any:
    """All layers as one parameter."""
    return optax.adafactor(rate, weight_decay_rate=0.1, weight_decay_mask=decay_mask)


def old_muon(rate: Any) -> Any:
    """With Nesterov momentum for the parameters of AdamW, too."""

    def numbers(path: Any, leaf: Any) -> Any:
        return optax.contrib.MuonDimensionNumbers(2, 1) if leaf.ndim == 3 else None

    direction = optax.contrib.muon(
        -1.0,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            numbers, params
        ),
    )
    decay = optax.add_decayed_weights(0.1, mask=decay_mask)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(rate))


def old_adamw(rate: Any) -> Any:
    return optax.adamw(rate, mask=decay_mask)


def old_lion(rate: Any) -> Any:
    return optax.lion(rate, mask=decay_mask)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "rule", "same"),
    [
        ("sgd", old_sgd, False),
        ("adafactor", old_adafactor, False),
        ("muon", old_muon, False),
        ("adamw", old_adamw, True),
        ("lion", old_lion, True),
    ],
)
def test_the_optimizer_state_of_another_version(
    name: Any, rule: Any, same: bool, tmp_path: Path
) -> None:
    """Is an error that says what to do, not damage that falls back to an older checkpoint."""
    params = {"model": {"layers": {"w": jnp.ones((2, 3, 4))}, "norm": {"weight": jnp.ones(3)}}}
    rate = optax.constant_schedule(1e-3)
    old = optax.chain(optax.clip_by_global_norm(1.0), rule(rate)).init(params)
    now = make_optimizer(
        name, rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0
    )
    with closing(open_manager(tmp_path, keep_last=2, keep_every=None)) as manager:
        save(manager, 1, params, old, {})
        wait(manager)
        if same:
            restored = restore(manager, params, now.init(params))
            assert restored is not None
            assert restored.step == 1
            return
        with pytest.raises(ValueError) as caught:
            restore(manager, params, now.init(params))
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints: the checkpoint of step 1 has the optimizer state of another version of "
        "this program: `python -m train export` its weights and begin a new run from them with "
        "--model.init-from"
    )


def test_no_checkpoint(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, keep_last=2, keep_every=None)
    assert restore(manager, *tree(0.0)) is None
    manager.close()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int32", "uint8", "float64"]),
    block=st.integers(1, 12),
)
def test_numpy_and_xla_agree(shape: list[int], dtype: str, block: int) -> None:
    """With blocks of which rows are parts, and that are parts of rows."""
    bits = np.random.default_rng(len(shape)).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize))
    values = bits.astype(np.uint8).view(jnp.dtype(dtype)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr("llama_jax.checkpoints.fingerprint._BLOCK", block)
        assert fingerprint_on_host(values) == int(fingerprint(values))


def test_large_states_are_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    values = jnp.arange(12.0).reshape(3, 4)
    by_numpy = fingerprints([values])
    monkeypatch.setattr("train.checkpoints._FEW_VALUES", 11)
    monkeypatch.setattr("train.checkpoints.fingerprint_on_host", None)
    assert fingerprints([values]) == by_numpy


def test_fingerprints_of_rows_add_up() -> None:
    values = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32))
    rows = [int(fingerprint(values[row : row + 1], row)) for row in range(5)]
    assert sum(rows) % 2**32 == int(fingerprint(values))
    assert sum(rows[::-1]) % 2**32 != int(fingerprint(values[::-1]))


def test_a_large_stack_is_stored_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a converter needs memory for one layer of it only."""
    monkeypatch.setattr("train.checkpoints.CHUNK_BYTES", 2**10)
    params = {"model": {"layers": {"w": jnp.ones((8, 32, 16))}}}
    with closing(open_manager(tmp_path, keep_last=1, keep_every=None)) as manager:
        save(manager, 1, params, {"count": jnp.zeros(())}, {})
        wait(manager)
    path = tmp_path / "checkpoints/1/params"
    leaf = ocp.StandardCheckpointer().metadata(path).item_metadata.tree["model"]["layers"]["w"]
    assert leaf.storage.chunk_shape[0] == 1
    assert np.prod(leaf.storage.chunk_shape) * 4 <= 2**10
