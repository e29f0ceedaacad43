"""The whole model. In float64: the algorithm. In float32 and bfloat16: the rounding.

In float64 ours equals the oracle. In float32 its error against the oracle is at most `ROUNDING_RATIO` times
that of Hugging Face's model; so it is in bfloat16, from weights that are bfloat16 numbers. These are the
rules P1, P2 and P3 of docs/parity.md.
"""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from parity_tests.harness.cases import (
    BASE,
    BY_NAME,
    MATRIX,
    Case,
    Inputs,
    inputs_of,
    weights_of,
)
from parity_tests.harness.cases import torch_inputs as as_torch
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.harness.programs import (
    compiled,
    oracle_numbers,
    our_inputs,
    our_model,
    our_numbers,
)
from parity_tests.harness.rounding import pooled_errors
from parity_tests.reference.errors import relative_error, worst
from parity_tests.reference.oracle import ACTIVATIONS, oracle
from parity_tests.reference.tolerances import FLOAT64_BAR, ROUNDING_RATIO


def float64_error(case: Case, seed: int = 0) -> tuple[float, str]:
    """The worst relative error of ours in float64 against the oracle, and of which number."""
    weights, inputs = weights_of(case.config, seed), inputs_of(case.inputs, case.config, seed)
    want = oracle_numbers(case.config, weights, inputs)
    with jax.enable_x64(True):
        got = our_numbers(our_model(case.config, weights, jnp.float64), inputs)
    assert {value.dtype for value in got.values()} == {np.dtype("float64")}
    return worst(got, want)


@pytest.mark.parametrize("case", MATRIX, ids=repr)
def test_float64_equals_the_oracle(case: Case, record_property: Any) -> None:
    error, name = float64_error(case)
    record_property("float64_error", error)
    assert error <= FLOAT64_BAR, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", ["everything", "mask_holes", "segments_and_padding", "mqa"])
def test_float64_with_blocked_attention(name: str) -> None:
    """The attention that long sequences take, whose backward pass is written out."""
    case = BY_NAME[name]
    weights, inputs = weights_of(case.config), inputs_of(case.inputs, case.config)
    want = oracle_numbers(case.config, weights, inputs)
    with jax.enable_x64(True):
        ours = our_model(case.config, weights, jnp.float64)
        options = our_inputs(inputs, jnp.float64)[1] | {"attention_implementation": "blocked"}
        got = our_numbers(ours, inputs, compiled(options, FAST_COMPILE))
    error, number = worst(got, want)
    assert error <= FLOAT64_BAR, f"{number}: relative error {error:.2e}"


@pytest.mark.parametrize(
    "name", ["everything", "mask_holes", "segments_and_padding", "keep_index", "tied", "mqa"]
)
def test_float64_hidden_states_and_attentions(name: str) -> None:
    case = BY_NAME[name]
    weights, inputs = weights_of(case.config), inputs_of(case.inputs, case.config)
    want = oracle(case.config, weights, **as_torch(inputs))
    with jax.enable_x64(True):
        arrays, ints = our_inputs(inputs, jnp.float64)
        got = jax.jit(
            lambda model, arrays: model(
                **arrays, **ints, output_hidden_states=True, output_attentions=True
            ),
            compiler_options=FAST_COMPILE,
        )(our_model(case.config, weights, jnp.float64), arrays)
    for field in ("hidden_states", "attentions"):
        ours, theirs = getattr(got, field), getattr(want, field)
        assert len(ours) == len(theirs)
        for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert relative_error(a, b) <= FLOAT64_BAR, f"{field}[{layer}]"


def test_outputs_that_are_not_requested_are_not_computed() -> None:
    case = BY_NAME["gqa_2_to_1"]
    arrays, _ = our_inputs(inputs_of(case.inputs, case.config), jnp.float32)
    model = our_model(case.config, weights_of(case.config), jnp.float32)
    out = model(arrays["input_ids"])
    assert out.loss is None
    assert out.hidden_states is None
    assert out.attentions is None
    assert out.cache is None


# Rounding -----------------------------------------------------------------------------------------

# One of each kind of rounding: rotations, softmax over masks, the loss; `everything` has all biases.
ROUNDING = [
    "gqa_3_to_1",
    "tied",
    "rope_dynamic_past",
    "rope_yarn",
    "rope_longrope_long",
    "rope_llama31",
    "mask_left",
    "segments",
    "num_items",
    "everything",
]


@pytest.mark.parametrize("input_seeds", [10, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ROUNDING)
def test_float32_is_as_exact_as_hugging_face(name: str, input_seeds: int) -> None:
    require_as_exact(name, pooled_errors(BY_NAME[name], input_seeds))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("everything", "gqa_3_to_1") else pytest.mark.slow)
        for n in ROUNDING
    ],
)
def test_bfloat16_is_as_exact_as_hugging_face(name: str) -> None:
    require_as_exact(name, pooled_errors(BY_NAME[name], 10, torch.bfloat16))


def require_as_exact(name: str, errors: dict[str, tuple[float, float]]) -> None:
    print(f"\n{name}: rms error against float64, ours and Hugging Face's")
    for number, (ours, theirs) in errors.items():
        print(f"  {number:56s} {ours:.3e} {theirs:.3e}  x {ours / theirs:.2f}")
    for number, (ours, theirs) in errors.items():
        assert ours <= ROUNDING_RATIO * theirs, f"{number}: {ours:.3e}, Hugging Face {theirs:.3e}"


# The space between the cases ---------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any config and any inputs, small."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    dim = 2 * draw(st.integers(2, 8))
    context = draw(st.sampled_from([8, 16, 32]))
    factor = draw(st.sampled_from([1.0, 2.0, 5.5]))
    theta = draw(st.sampled_from([50.0, 1e4, 5e5]))
    trained = {"original_max_position_embeddings": context}
    factors = st.lists(st.floats(1, 9, width=32), min_size=dim // 2, max_size=dim // 2)
    rope = draw(
        st.one_of(
            st.just({"rope_type": "default"}),
            st.just({"rope_type": "linear", "factor": factor}),
            st.just({"rope_type": "dynamic", "factor": factor}),
            st.fixed_dictionaries(
                {"rope_type": st.just("yarn"), "factor": st.just(factor)},
                optional={
                    "truncate": st.booleans(),
                    "beta_fast": st.floats(2, 40),
                    "beta_slow": st.floats(0.1, 1.5),
                    "mscale": st.floats(0.1, 2),
                    "mscale_all_dim": st.floats(0.1, 2),
                    "attention_factor": st.floats(0.5, 2),
                },
            ).map(lambda fields: fields | trained),
            st.fixed_dictionaries(
                {"rope_type": st.just("longrope"), "short_factor": factors, "long_factor": factors},
                optional={"factor": st.just(factor), "attention_factor": st.floats(0.5, 2)},
            ).map(lambda fields: fields | trained),
            st.just(
                {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": draw(st.floats(1.5, 8)),
                }
                | trained
            ),
            st.fixed_dictionaries(
                {"rope_type": st.just("proportional"), "factor": st.just(factor)},
                # Where no pair turns, the gradient of the keys' bias is zero but for rounding.
                optional={"partial_rotary_factor": st.floats(0.5, 1)},
            ),
        )
    )
    config = BASE | {
        "hidden_size": heads * draw(st.integers(2, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": draw(st.integers(5, 70)),
        "intermediate_size": draw(st.integers(5, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "hidden_act": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "max_position_embeddings": context * draw(st.sampled_from([1, 4])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "pretraining_tp": draw(st.integers(1, 2)),
        "rope_parameters": rope | {"rope_theta": theta},
    }
    del config["rope_theta"]
    labels = draw(st.sampled_from([None, "all", "some", "one_row_empty", "none"]))
    length = draw(st.integers(1, 40))
    inputs = Inputs(
        batch=draw(st.integers(1, 3)),
        length=length,
        mask=draw(st.sampled_from([None, "right", "left", "holes"])),
        positions=draw(st.sampled_from([None, "shifted", "far", "scattered"])),
        embeds=draw(st.booleans()),
        segments=draw(st.booleans()),
        labels=labels,
        num_items=draw(st.sampled_from([None, 23])) if labels else None,
        keep=0 if labels or length < 3 else draw(st.sampled_from([0, 1, 3, "index"])),
    )
    return Case("drawn", config, inputs)


settings = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],  # every example compiles: shrinking would take an hour
    print_blob=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@hypothesis.given(case=cases(), seed=st.integers(0, 2**16))
@hypothesis.settings(settings, max_examples=12)
def test_float64_any_model_any_input(case: Case, seed: int) -> None:
    hypothesis.note(f"{case.config}\n{case.inputs}")
    error, name = float64_error(case, seed)
    assert error <= FLOAT64_BAR, f"{name}: relative error {error:.2e}"


@pytest.mark.slow
@hypothesis.given(case=cases(), seed=st.integers(0, 2**16))
@hypothesis.settings(settings, max_examples=200)
def test_float64_any_model_any_input_at_length(case: Case, seed: int) -> None:
    hypothesis.note(f"{case.config}\n{case.inputs}")
    error, name = float64_error(case, seed)
    assert error <= FLOAT64_BAR, f"{name}: relative error {error:.2e}"
