"""Compensated rounding: the paper's equations, and what it does to outputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.quantization.compensation import compensated, compensation
from llama_jax.quantization.weight import (
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
)

KINDS = [(8, None), (8, 16), (4, 16), (4, 32)]
WIDTH = 160  # more than a block of columns, and not a multiple of it


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and inputs of different sizes that depend on each other."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(300, WIDTH)) @ generator.normal(size=(WIDTH, WIDTH))
    return generator.normal(size=(24, WIDTH)), mixed * np.exp(generator.normal(size=WIDTH))


@partial(jax.jit, static_argnums=(1, 2))
def rounded(weight: jax.Array, bits: int, group_size: int | None) -> tuple[jax.Array, ...]:
    if bits == 4:
        assert group_size is not None
        return quantize_int4(weight, group_size)
    return quantize_int8(weight, group_size)


def restored(stored: tuple[jax.Array, ...], bits: int) -> np.ndarray:
    values = dequantize_int4(*stored) if bits == 4 else dequantize_int8(*stored)
    return np.asarray(values).reshape(-1, WIDTH)


def by_the_papers_equations(
    weight: np.ndarray, moments: np.ndarray, scale: np.ndarray, zero: np.ndarray, limits: list[int]
) -> np.ndarray:
    """Equations 2 and 3 of arXiv:2210.17323, with a complete inverse that shrinks by each column."""
    weight, result = weight.copy(), np.zeros_like(weight)
    inverse = np.linalg.inv(moments + 0.01 * np.mean(np.diag(moments)) * np.eye(WIDTH))
    size = WIDTH // scale.shape[1]
    for column in np.argsort(-np.diag(moments), kind="stable"):
        step, offset = scale[:, column // size], zero[:, column // size]
        code = np.clip(np.round((weight[:, column] - offset) / step), *limits)
        result[:, column] = code * step + offset
        error = (weight[:, column] - result[:, column]) / inverse[column, column]
        weight -= error[:, None] * inverse[column]
        row = inverse[column].copy()
        inverse -= np.outer(row, row) / row[column]
        inverse[column, column] = 1  # done; what is left of its row is rounding
        inverse[column, :column] = inverse[column, column + 1 :] = 0
        inverse[:column, column] = inverse[column + 1 :, column] = 0
    return result


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_it_is_the_papers_method(bits, group_size):
    values, inputs = random_case(seed=bits)
    moments = inputs.T @ inputs
    with jax.enable_x64(True):
        weight = jnp.asarray(values)
        _, scale, *zero = rounded(weight, bits, group_size)
        scale = np.asarray(scale).reshape(len(values), -1)
        offset = np.asarray(zero[0]) if zero else np.zeros_like(scale)
        result = restored(compensated(weight, compensation(moments), bits, group_size), bits)
    limits = [-8, 7] if bits == 4 else [-127, 127]
    expected = by_the_papers_equations(values, moments, scale, offset, limits)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_outputs_change_less(bits, group_size, dtype):
    values, inputs = random_case(seed=10 * bits)
    weight = jnp.asarray(values, dtype)
    wide = np.asarray(weight, np.float64)
    stored = compensated(weight, compensation(inputs.T @ inputs), bits, group_size)
    plain = rounded(weight, bits, group_size)
    assert [part.dtype for part in stored] == [part.dtype for part in plain]
    assert [part.shape for part in stored] == [part.shape for part in plain]
    for part, of_plain in zip(stored[1:], plain[1:], strict=True):
        assert np.array_equal(part, of_plain)  # scales and zeros
    errors = [
        np.linalg.norm(inputs @ (restored(each, bits).astype(np.float64) - wide).T)
        for each in (stored, plain)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_without_moments_it_is_plain_rounding(bits, group_size):
    values, _ = random_case(seed=0)
    weight = jnp.asarray(values, jnp.float32)
    stored = compensated(weight, compensation(np.zeros((WIDTH, WIDTH))), bits, group_size)
    for part, expected in zip(stored, rounded(weight, bits, group_size), strict=True):
        assert np.array_equal(part, expected)


def test_an_input_that_is_always_zero_changes_nothing():
    values, inputs = random_case(seed=1)
    inputs[:, 7] = 0
    stored = compensated(jnp.asarray(values, jnp.float32), compensation(inputs.T @ inputs), 8, None)
    assert np.isfinite(restored(stored, 8)).all()
