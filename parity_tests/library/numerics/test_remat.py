"""What a layer computes again changes the memory of a step, and no number."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.numerics.remat_policy import Kept, KeptName, OffloadedName
from llama_jax.numerics.xla_options import step_compiler_options
from train.hardware.flops import matmul_flops

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 160)))


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))


def run(model, **options):
    """Loss, gradients, and the temporary memory of computing them."""
    step = jax.value_and_grad(lambda model: model(IDS, labels=IDS, **options).loss)
    program = jax.jit(step).lower(model).compile()
    loss, gradient = program(model)
    return loss, jax.tree.leaves(gradient), program.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def reference(model):
    return run(model, remat="none")


@pytest.mark.parametrize(
    "options",
    [
        {"remat": "dots"},
        {"remat": "full"},
        {"remat": "dots", "scan_unroll": 2},
        {"remat": "full", "scan_unroll": 6},
        {"remat": "none", "scan_unroll": 4},
        {"remat": Kept(("attention", "gate"))},
        {"remat": Kept(("down", "query"), ("input", "up"))},
    ],
    ids=str,
)
def test_remat_changes_no_number(model, reference, options):
    loss, gradients, _ = run(model, **options)
    np.testing.assert_allclose(loss, reference[0], rtol=1e-6)
    for ours, theirs in zip(gradients, reference[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(abs(theirs).max()))


def test_remat_saves_memory(model, reference):
    dots, full = (run(model, remat=remat)[2] for remat in ("dots", "full"))
    assert full < 0.7 * dots
    assert dots < 0.7 * reference[2]


def flops(model, remat):
    """Of a gradient, as it will run: without what nothing uses."""
    step = jax.grad(lambda model: model(IDS, labels=IDS, remat=remat).loss)
    return matmul_flops(jax.make_jaxpr(step)(model).jaxpr)


def test_what_is_kept_by_name_is_not_computed_again(model):
    """Each projection's matmul, or attention's; nothing needs "down" again, and the input is free."""
    full, tokens, layers = flops(model, "full"), IDS.size, CONFIG.num_hidden_layers
    hidden, keys, intermediate = 64, 32, 192
    weights = dict.fromkeys(("query", "output"), hidden * hidden)
    weights |= dict.fromkeys(("key", "value"), hidden * keys)
    weights |= dict.fromkeys(("gate", "up"), hidden * intermediate)
    weights |= {"down": 0, "input": 0}
    assert {*weights, "attention"} == {*get_args(OffloadedName)} == {*get_args(KeptName), "input"}
    for name, weight in weights.items():
        expected = full - 2 * layers * tokens * weight
        assert flops(model, Kept((), (name,))) == expected, name
        if name != "input":
            assert flops(model, Kept((name,))) == expected, name
    # less than all pairs of tokens, twice
    pairs = 4 * layers * tokens * IDS.shape[1] * hidden
    assert 0.4 * pairs < full - flops(model, Kept(("attention",))) <= pairs
    assert flops(model, Kept(get_args(KeptName))) == flops(model, "dots")


def test_offloaded_residuals_are_in_host_memory(model):
    step = jax.grad(lambda model: model(IDS, labels=IDS, remat=Kept((), ("input",))).loss)
    text = str(jax.make_jaxpr(step)(model))
    stacked = f"float32<host>[{CONFIG.num_hidden_layers},2,160,64]"
    assert stacked.replace("float", "f") in text or stacked in text


def test_bfloat16_residuals_stay_bfloat16(model):
    narrow = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), model)
    step = jax.grad(lambda model: model(IDS, labels=IDS).loss)
    lowered = jax.jit(step).lower(narrow)
    plain, ours = (
        lowered.compile(options).memory_analysis().temp_size_in_bytes
        for options in ({}, step_compiler_options())
    )
    assert ours < 0.8 * plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remat": "everything"}, "remat: found 'everything', expected one of none, dots, full"),
        ({"remat": Kept(("gates",))}, "remat: found saved 'gates', expected some of query, key, "),
        ({"remat": Kept(("input",))}, "remat: found saved 'input', expected some of query, key, "),
        ({"remat": Kept((), ("x",))}, "remat: found offloaded 'x', expected some of input, query,"),
        (
            {"remat": Kept(("up",), ("up",))},
            "remat: found up among both the saved and the offloaded, expected it once",
        ),
        ({"scan_unroll": 0}, "scan_unroll: found 0, expected a positive integer"),
        ({"attention_implementation": "flash"}, "attention_implementation: found 'flash'"),
    ],
)
def test_unknown_choices_are_errors(model, options, message):
    with pytest.raises(ValueError) as caught:
        model(IDS, **options)
    assert message in str(caught.value)
