"""A number is a number whoever made it, a key a key; what is neither is said in one line."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM, LMHead, fused_linear_cross_entropy
from llama_jax.generation.sampling import Sampling, checked
from llama_jax.inputs.keys import as_key
from llama_jax.inputs.positions import keep_positions
from llama_jax.numerics.scalars import plain_number
from parity_tests.harness.cases import BY_NAME, weights_of
from parity_tests.harness.programs import our_model

INTEGERS = [np.int32(3), np.int64(3), np.uint8(3), np.asarray(3), jnp.asarray(3)]
NUMBERS = [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.asarray(0.5), jnp.float32(0.5)]


@pytest.mark.parametrize("value", [*INTEGERS, *NUMBERS, Fraction(1, 2), np.bool_(True)], ids=repr)
def test_scalars_become_python_numbers(value):
    number = plain_number(value)
    assert type(number) in (int, float, bool)
    assert number == value


def test_other_values_are_unchanged():
    for value in (None, "3", [3], np.asarray([3])):
        assert plain_number(value) is value


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_counts_of_numpy_and_jax(value):
    assert checked(Sampling(do_sample=True, top_k=value)).top_k == 3
    config = LlamaConfig(vocab_size=value, pad_token_id=value, eos_token_id=[value, 2])
    assert config == LlamaConfig(vocab_size=3, pad_token_id=3, eos_token_id=[3, 2])
    assert {type(x) for x in (config.vocab_size, config.pad_token_id, *config.eos_token_ids)} == {
        int
    }
    assert keep_positions(jnp.zeros((1, 5)), value).shape == (1, 3)


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_of_numpy_and_jax(value):
    sampling = Sampling(do_sample=True, temperature=value, top_p=value, repetition_penalty=value)
    assert float(checked(sampling).temperature) == 0.5
    config = LlamaConfig(attention_dropout=value, rope_parameters={"rope_theta": value})
    assert (config.attention_dropout, config.rope["rope_theta"]) == (0.5, 0.5)
    x, labels = jnp.ones((2, 4)), jnp.zeros(2, jnp.int32)
    losses = [
        fused_linear_cross_entropy(x, jnp.ones((5, 4)), labels, z_loss=z, softcap=z).loss
        for z in (value, 0.5)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: checked(Sampling(do_sample=True, top_k=True)),
        lambda: checked(Sampling(do_sample=True, temperature=np.bool_(True))),
        lambda: LlamaConfig(vocab_size=True),
        lambda: LlamaConfig(pad_token_id=np.bool_(True)),
        lambda: keep_positions(jnp.zeros((1, 5)), True),
    ],
)
def test_a_bool_is_not_a_count(make):
    with pytest.raises(ValueError, match="found"):
        make()


def tiny() -> LlamaForCausalLM:
    config = BY_NAME["gqa_2_to_1"].config | {"eos_token_id": None, "pad_token_id": 0}
    return our_model(config, weights_of(config), jnp.float32)


def test_generation_accepts_scalars_of_numpy_and_jax():
    model, ids = tiny(), np.ones((1, 3), np.int32)
    plain = {
        "max_new_tokens": 3,
        "eos_token_id": 5,
        "pad_token_id": 0,
        "temperature": 0.5,
        "top_k": 4,
    }
    plain |= {"cache_capacity": 16, "do_sample": True}
    arrays = {name: np.asarray(value) for name, value in plain.items()}
    want = model.generate(ids, key=jax.random.key(3), **plain)
    np.testing.assert_array_equal(want, model.generate(ids, key=jax.random.key(3), **arrays))
    # the raw key of the same seed draws the same
    raw = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(want, model.generate(ids, key=raw, **plain))
    np.testing.assert_array_equal(want, model.generate(ids, key=np.asarray(raw), **plain))
    streamed = list(model.stream(ids, key=raw, **arrays))
    assert np.concatenate(streamed).tolist() == want[0, 3:].tolist()
    with pytest.raises(ValueError, match="max_new_tokens: found True"):
        model.generate(ids, max_new_tokens=True)


@pytest.mark.parametrize(
    "key", [3, np.int64(3), np.asarray(3), "3", 0.5, jax.random.split(jax.random.key(0))]
)
def test_bad_keys(key):
    with pytest.raises(ValueError) as error:
        as_key("key", key)
    message = str(error.value)
    assert message.startswith("key: found")
    assert "\n" not in message
    assert "jax.random.key(3)" in message or not np.issubdtype(type(plain_number(key)), np.integer)


def test_seeds_are_not_keys():
    model, ids = tiny(), np.ones((1, 3), np.int32)
    expected = r"found 0, expected a PRNG key such as jax.random.key\(0\)"
    with pytest.raises(ValueError, match=f"^key: {expected}$"):
        model.generate(ids, max_new_tokens=2, key=0)
    with pytest.raises(ValueError, match=f"^dropout_key: {expected}$"):
        model(ids, dropout_key=0)
    np.testing.assert_array_equal(
        model(ids, dropout_key=jax.random.PRNGKey(1)).logits,
        model(ids, dropout_key=jax.random.key(1)).logits,
    )
    for make in (
        lambda rngs: LlamaForCausalLM(model.config, rngs=rngs),
        lambda rngs: LMHead(d_model=2, vocab_size=3, rngs=rngs),
    ):
        with pytest.raises(
            ValueError, match=r"^rngs: found 0, expected flax.nnx.Rngs such as nnx.Rngs\(0\)$"
        ):
            make(0)
        make(nnx.Rngs(0))
