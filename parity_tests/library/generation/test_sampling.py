"""Each filter gives what transformers' processor of that name gives on the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import generation as hf

from llama_jax.generation import sampling
from llama_jax.generation.sampling import Sampling, checked, choose, filtered

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
BATCH, VOCAB = 3, 37


def logits_of(seed: int) -> np.ndarray:
    """Some with ties."""
    logits = np.random.default_rng(seed).normal(scale=3, size=(BATCH, VOCAB)).astype(np.float32)
    return np.round(logits, 1) if seed % 2 else logits


def theirs(processor, logits: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    ids = np.zeros((BATCH, 1), np.int64) if ids is None else ids
    return processor(torch.from_numpy(ids), torch.from_numpy(logits)).numpy()


def same(ours: jax.Array, want: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(want))
    np.testing.assert_allclose(ours, want, rtol=1e-6)


@few
@given(seeds, st.floats(0.05, 10))
def test_temperature(seed, temperature):
    logits = logits_of(seed)
    ours = sampling.temperature_filter(jnp.asarray(logits), jnp.float32(temperature))
    same(ours, theirs(hf.TemperatureLogitsWarper(temperature), logits))


@few
@given(seeds, st.integers(1, VOCAB + 5))
def test_top_k(seed, top_k):
    logits = logits_of(seed)
    same(
        sampling.top_k_filter(jnp.asarray(logits), top_k),
        theirs(hf.TopKLogitsWarper(top_k), logits),
    )


def not_at(boundary: float, values: np.ndarray) -> None:
    """Leave out what rounding decides."""
    assume(np.abs(values - boundary).min() > 1e-5)


@few
@given(seeds, st.floats(0.01, 1.0))
def test_top_p(seed, top_p):
    logits = logits_of(2 * seed)  # torch's sort orders ties as it likes
    ordered = np.sort(torch.softmax(torch.from_numpy(logits).double(), -1).numpy(), axis=-1)
    not_at(1 - top_p, np.cumsum(ordered, axis=-1)[:, :-1])
    ours = sampling.top_p_filter(jnp.asarray(logits), jnp.float32(top_p))
    same(ours, theirs(hf.TopPLogitsWarper(top_p), logits))


@few
@given(seeds, st.floats(0.0, 1.0))
def test_min_p(seed, min_p):
    logits = logits_of(seed)
    p = torch.softmax(torch.from_numpy(logits).double(), -1).numpy()
    not_at(min_p, np.where(p == p.max(-1, keepdims=True), -1, p / p.max(-1, keepdims=True)))
    ours = sampling.min_p_filter(jnp.asarray(logits), jnp.float32(min_p))
    same(ours, theirs(hf.MinPLogitsWarper(min_p), logits))


@few
@given(seeds, st.floats(0.5, 3))
def test_repetition_penalty(seed, penalty):
    logits = logits_of(seed)
    ids = np.random.default_rng(seed).integers(0, VOCAB, (BATCH, 9))
    seen = np.zeros((BATCH, VOCAB), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    ours = sampling.repetition_filter(jnp.asarray(logits), jnp.asarray(seen), jnp.float32(penalty))
    same(ours, theirs(hf.RepetitionPenaltyLogitsProcessor(penalty), logits, ids))


def test_filters_in_the_order_of_transformers():
    logits, ids = logits_of(4), np.asarray([[1, 2], [3, 4], [5, 6]])
    seen = np.zeros((BATCH, VOCAB), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    chosen = Sampling(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.5,
        processors=(lambda ids, logits, lengths: logits.at[:, 0].set(-jnp.inf),),
    )
    ours = filtered(
        checked(chosen),
        jnp.asarray(logits),
        jnp.asarray(ids),
        jnp.full(BATCH, 2),
        jnp.asarray(seen),
    )
    want = theirs(hf.RepetitionPenaltyLogitsProcessor(1.5), logits, ids)
    want[:, 0] = -np.inf
    for processor in (
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(20),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    ):
        want = theirs(processor, want)
    same(ours, want)


def test_samples_follow_the_distribution():
    scores = jnp.log(jnp.broadcast_to(jnp.asarray([0.5, 0.3, 0.2, 0.0]), (20000, 4)))
    drawn = choose(Sampling(do_sample=True), scores, jax.random.key(0))
    frequencies = np.bincount(np.asarray(drawn), minlength=4) / 20000
    np.testing.assert_allclose(frequencies, [0.5, 0.3, 0.2, 0.0], atol=0.015)


@pytest.mark.parametrize("vocab", [1, 5, 128, 129, 1000])
def test_the_likeliest_is_the_first_of_the_largest(vocab):
    scores = np.random.default_rng(0).integers(-3, 4, (5, vocab)).astype(np.float32)
    scores[1] = -np.inf
    scores[2, vocab // 2] = np.nan
    scores[3, [vocab // 3, -1]] = np.inf
    token = jax.jit(lambda scores: choose(Sampling(), scores, None))(scores)
    assert token.dtype == jnp.int32
    np.testing.assert_array_equal(token, torch.from_numpy(scores).argmax(dim=-1))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -1.0, "expected a positive number"),
        ("temperature", 0.0, "expected a positive number"),
        ("temperature", float("nan"), "expected a positive number"),
        ("temperature", "hot", "found 'hot'"),
        ("top_p", 0.0, "top_p: found 0.0, expected a number in (0, 1]"),
        ("top_p", 1.5, "expected a number in (0, 1]"),
        ("min_p", -0.1, "expected a number in [0, 1]"),
        ("top_k", -1, "expected an integer of at least 0"),
        ("top_k", 1.5, "expected an integer"),
        ("repetition_penalty", 0.0, "expected a positive number"),
    ],
)
def test_bad_numbers(name, value, expected):
    with pytest.raises(ValueError) as error:
        checked(Sampling(do_sample=True, **{name: value}))
    assert expected in str(error.value)
