"""The maximum and the sum of exponentials of each row, in one pass and in two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.loss import fused_linear_cross_entropy, statistics
from llama_jax.loss.statistics import one_pass, row_statistics
from parity_tests.reference.tolerances import FLOAT64_BAR

INF, NAN = np.inf, np.nan


@pytest.fixture
def on_gpu(monkeypatch):
    """What a GPU computes, on the CPU. Compiled programs are kept from other tests and theirs from this."""
    monkeypatch.setattr(statistics, "target_platform", lambda: "gpu")
    jax.clear_caches()
    yield
    jax.clear_caches()


def logsumexp(logits):
    """In float64, of rows whose maximum is finite."""
    wide = np.asarray(logits, np.float64)
    row_max = wide.max(axis=-1, keepdims=True)
    return row_max[:, 0] + np.log(np.exp(wide - row_max).sum(axis=-1))


@pytest.mark.parametrize("columns", [1, 2, 97, 256])
def test_one_pass_is_as_accurate_as_two(columns):
    """Rows that rise, fall or neither: the maximum changes with every column, once, or a few times.

    Of at most 256 columns, the block that XLA sums on a GPU before it sums the blocks. A CPU adds all
    columns one after another, which rounds more.
    """
    rng = np.random.default_rng(columns)
    logits = (10 * rng.normal(size=(48, columns)) - 300).astype(np.float32)
    logits[:16].sort(axis=1)
    logits[16:32] = -np.sort(-logits[16:32], axis=1)
    expected = logsumexp(logits)
    row_max, row_sum = one_pass(jnp.asarray(logits))
    np.testing.assert_array_equal(row_max, logits.max(axis=-1))
    two_max, two_sum = row_statistics(jnp.asarray(logits), None)
    one, two = (
        np.abs(np.log(np.asarray(total, np.float64)) + np.asarray(top, np.float64) - expected)
        for top, total in ((row_max, row_sum), (two_max, two_sum))
    )
    assert one.max() <= max(2 * two.max(), 1e-6)


@pytest.mark.parametrize(
    "row",
    [
        [-INF, -INF, -INF],
        [-INF, -5000.0, -INF],
        [INF, 1.0, INF],
        [-INF, INF, 0.0],
        [1.0, NAN, 2.0],
        [NAN, INF, -INF],
        [3e38, -3e38, 0.0],
    ],
)
def test_special_values_as_in_two_passes(row, on_gpu, monkeypatch):
    logits = jnp.asarray([row, [0.0, 1.0, 2.0]], jnp.float32)
    found = row_statistics(logits, None)
    monkeypatch.setattr(statistics, "target_platform", lambda: "cpu")
    for one, two in zip(found, row_statistics(logits, None), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_of_a_gpu_is_the_plain_formula(reduction, on_gpu):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        hidden, kernel = (jnp.asarray(rng.normal(size=(size, 8))) for size in (37, 23))
        labels = jnp.asarray(rng.integers(0, 23, 37)).at[3].set(-100)

        def loss(arrays, mode):
            out = fused_linear_cross_entropy(
                *arrays, labels, reduction=reduction, z_loss=0.01, chunk=8, mode=mode
            )
            return jnp.sum(jnp.sin(out.loss))

        values, expected = (
            jax.tree.leaves(jax.value_and_grad(loss)((hidden, kernel), mode))
            for mode in ("auto", "reference")
        )
    for value, right in zip(values, expected, strict=True):
        assert np.abs(value - right).max() <= FLOAT64_BAR * np.abs(right).max()
