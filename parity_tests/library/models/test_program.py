"""Properties of the compiled program: size, dtypes, what is computed and what is not."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import GenerationConfig, LlamaConfig, LlamaForCausalLM, init_cache

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_bias=True,
    mlp_bias=True,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 10)), jnp.int32)


@functools.cache
def model_of(dtype: jnp.dtype = jnp.float32, **changes: object) -> LlamaForCausalLM:
    config = replace(CONFIG, **changes)
    # one compilation instead of one for every parameter's initializer
    return jax.jit(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype))()


def loss(model: LlamaForCausalLM, ids: jax.Array) -> jax.Array:
    return model(ids, labels=ids).loss


@pytest.mark.parametrize("function", [lambda m, i: m(i).logits, jax.grad(loss)])
def test_the_program_does_not_grow_with_depth(function):
    sizes = []
    for depth in (4, 32):
        model = nnx.eval_shape(lambda depth=depth: model_of(num_hidden_layers=depth))
        compiled = jax.jit(function).lower(model, IDS).compile()
        sizes.append(compiled.as_text().count(" = "))
    assert sizes[1] <= sizes[0] * 1.02


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_the_layers_backward_pass_waits_for_gradients_that_are_larger_unreduced():
    """XLA must not keep the head's complete gradient, or what the last norm's needs, until the end."""
    jaxpr = jax.make_jaxpr(jax.grad(loss))(model_of(), IDS)
    tied = [
        {value.aval.shape for value in equation.outvars}
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "optimization_barrier"
    ]
    hidden, head, norm = (*IDS.shape, 32), (97, 32), (32,)
    assert {hidden, head} in tied
    assert tied.count({hidden, norm}) == 2  # forward and backward


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_every_matmul_accumulates_in_float32(dtype):
    """Forward and backward: operands in the model's dtype, never mixed, results in float32."""
    jaxpr = jax.make_jaxpr(jax.grad(loss))(model_of(dtype), IDS)
    matmuls = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    # 7 projections, 2 of attention and the loss-in-head, each with two in the backward pass; the recomputed
    # scores; and the logits, which are unused here and dropped by the compiler
    assert len(matmuls) == 3 * 10 + 2
    for matmul in matmuls:
        assert {variable.aval.dtype for variable in matmul.invars} == {jnp.dtype(dtype)}
        assert matmul.outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_no_dtype_changes_silently(dtype):
    model = model_of(dtype)
    out = jax.jit(lambda m: m(IDS, labels=IDS, output_hidden_states=True, output_attentions=True))(
        model
    )
    assert out.loss.dtype == jnp.float32
    for array in (out.logits, *out.hidden_states, *out.attentions):
        assert array.dtype == dtype
    gradient = jax.jit(jax.grad(loss))(model, IDS)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}


def test_no_float64_in_a_float32_program_under_x64():
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(model_of(), IDS)
        wide = [
            e
            for e in equations(jaxpr.jaxpr)
            if any(getattr(v.aval, "dtype", None) == jnp.float64 and v.aval.ndim for v in e.outvars)
        ]
    assert wide == []


def test_logits_alone_compile_no_loss():
    model = model_of()
    with_labels = jax.jit(lambda m: m(IDS, labels=IDS).logits).lower(model).compile()
    without = jax.jit(lambda m: m(IDS).logits).lower(model).compile()
    flops = [program.cost_analysis()["flops"] for program in (with_labels, without)]
    assert flops[0] == flops[1]


def test_float32_logits_have_forward_derivatives():
    model = model_of(num_hidden_layers=1)

    def energy(model: LlamaForCausalLM) -> jax.Array:
        return jnp.mean(jnp.square(model(IDS).logits))

    _, tangent = jax.jit(lambda m: jax.jvp(energy, (m,), (m,)))(model)
    gradient = jax.jit(jax.grad(energy))(model)
    dots = jax.tree.map(lambda g, w: (g * w).sum(), gradient, model)
    np.testing.assert_allclose(tangent, sum(jax.tree.leaves(dots)), rtol=1e-4)


@jax.jit
def attend(model: LlamaForCausalLM, key: jax.Array | None) -> tuple[jax.Array, ...]:
    return model(IDS, output_attentions=True, dropout_key=key).attentions


def test_dropout_needs_a_key_and_scales_the_rest():
    model = model_of(attention_dropout=0.5)
    exact = np.asarray(attend(model_of(), None)[0])
    assert (attend(model, None)[0] == exact).all()  # evaluation: off
    first, second, *_ = map(np.asarray, attend(model, jax.random.key(0)))
    seen = exact > 0
    kept = (first > 0) & seen
    assert 0.4 < kept.sum() / seen.sum() < 0.6
    np.testing.assert_allclose(first[kept], 2 * exact[kept], rtol=1e-6)
    assert ((second > 0) != (first > 0)).any()  # layers drop different weights
    assert (attend(model, jax.random.key(0))[0] == first).all()
    assert (attend(model, jax.random.key(1))[0] != first).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(), "exactly one of input_ids and inputs_embeds"),
        (lambda m: m(IDS, inputs_embeds=jnp.zeros((2, 10, 32))), "exactly one of"),
        (lambda m: m(IDS.at[0, 3].set(97)), "input_ids: found token 97, expected 0 to 96"),
        (lambda m: m(IDS.at[0, 3].set(-1)), "input_ids: found token -1"),
        (lambda m: m(IDS, attention_mask=jnp.ones((2, 9))), "attention_mask: found shape (2, 9)"),
        (lambda m: m(IDS, segment_ids=jnp.ones((1, 10), int)), "segment_ids: found shape (1, 10)"),
        (
            lambda m: m.model(IDS, visible_until=jnp.ones((1, 10), int)),
            "visible_until: found shape (1, 10)",
        ),
        (
            lambda m: m.model(
                IDS, visible_until=IDS, cache=init_cache(m.config, 2, 16, jnp.float32)
            ),
            "at most one of visible_until, cache and token_order",
        ),
        (
            lambda m: m(IDS, position_ids=jnp.ones((3, 10), int)),
            "position_ids: found shape (3, 10)",
        ),
        (
            lambda m: m(IDS, labels=IDS[:, 1:]),
            "labels: found int32[2, 9], expected integers [2, 10]",
        ),
        (lambda m: m(IDS, labels=IDS.astype(float)), "labels: found float32[2, 10]"),
        (
            lambda m: m(IDS, labels=IDS.at[1, 1].set(97)),
            "labels: found 97, expected -100 or 0 to 96",
        ),
        (lambda m: m(IDS, logits_to_keep=-1), "logits_to_keep: found -1"),
        (lambda m: m(IDS, logits_to_keep=jnp.asarray([3, 10])), "expected -10 to 9"),
        (lambda m: m(IDS, logits_to_keep=jnp.asarray([1.0])), "logits_to_keep: found float32[1]"),
        (lambda m: m(IDS, cache=init_cache(m.config, 2, 9, jnp.float32)), "cache: 9 slots"),
        (lambda m: m(IDS, cache=init_cache(m.config, 3, 16, jnp.float32)), "cache: found keys"),
        (lambda m: m(IDS, cache=init_cache(CONFIG, 2, 16, jnp.float32)), "cache: found keys"),
        (lambda m: m(inputs_embeds=jnp.zeros((2, 10, 31))), "expected [batch, seq, 32]"),
        (lambda m: m(IDS, labels=IDS, num_items_in_batch=jnp.ones(2)), "num_items_in_batch: found"),
        (lambda m: m.generate(IDS, max_new_tokens=2.0), "max_new_tokens: found 2.0"),
        (lambda m: m.generate(IDS, max_new_tokens=0), "max_new_tokens: found 0"),
        (lambda m: m.generate(IDS, jnp.ones((2, 9)), max_new_tokens=1), "attention_mask: found"),
    ],
)
def test_bad_arguments_are_one_line_errors(call, message):
    with pytest.raises(ValueError) as caught:
        call(model_of(num_hidden_layers=1))
    assert message in str(caught.value)


def test_ids_and_labels_outside_the_vocabulary_are_nan_under_jit():
    """Never a silent gather of another row."""
    model = model_of(num_hidden_layers=1)
    for wrong in (97, -1):
        ids = IDS.at[0, 3].set(wrong)
        assert np.isnan(jax.jit(lambda m, ids: m(ids).logits)(model, ids)[0, 3]).all()
        scored = jax.jit(lambda m, labels: m(IDS, labels=labels).loss)
        assert np.isnan(scored(model, ids))


def test_positions_out_of_range_are_nan_under_jit():
    model = model_of(num_hidden_layers=1)
    keep = jax.jit(lambda m, kept: m(IDS, logits_to_keep=kept).logits)
    for kept in (jnp.asarray([3, 10]), jnp.asarray([[3, 10], [3, -11]])):
        logits = np.asarray(keep(model, kept))
        assert np.isfinite(logits[:, 0]).all()
        assert np.isnan(logits[:, 1]).all()


def test_a_full_cache_gives_nan_under_jit():
    model = model_of(num_hidden_layers=1)
    step = jax.jit(lambda m, cache: m(IDS, cache=cache))
    out = step(model, init_cache(model.config, 2, 15, jnp.float32))
    assert np.isfinite(out.logits).all()
    assert np.isnan(step(model, out.cache).logits).all()


def test_a_call_outside_jit_compiles_once(caplog):
    model, others = model_of(), IDS[::-1]
    jax.block_until_ready(model(IDS, labels=IDS).loss)
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        for _ in range(2):
            jax.block_until_ready(model(others, labels=IDS).loss)
    assert [r.message for r in caplog.records if "Compiling" in r.message] == []


def test_lists_are_accepted_as_arrays():
    model, rows = model_of(), IDS.tolist()
    ones = [[1] * 10] * 2
    listed = model(rows, attention_mask=ones, position_ids=[list(range(10))], labels=rows)
    assert listed.loss == model(IDS, labels=IDS).loss
    kept = model(IDS, logits_to_keep=[3, 4]).logits
    np.testing.assert_allclose(kept, model(IDS).logits[:, 3:5], rtol=1e-6)
    one = model(IDS, logits_to_keep=np.int64(1)).logits
    # one token of each row takes the way of a decoding step, which sums in another order
    np.testing.assert_allclose(one, model(IDS).logits[:, -1:], rtol=1e-6, atol=1e-6)


def test_a_cached_row_continues_its_last_segment():
    """Tokens after a packed prompt see its last document, and none of the earlier ones."""
    model = model_of()
    segments = jnp.asarray([[1] * 4 + [2] * 6, [3] * 10])
    uncached = model(IDS, segment_ids=segments).logits
    cache = model(
        IDS[:, :6],
        segment_ids=segments[:, :6],
        cache=init_cache(CONFIG, 2, 10, jnp.float32),
    ).cache
    rest = model(IDS[:, 6:], cache=cache).logits
    np.testing.assert_allclose(rest, uncached[:, 6:], rtol=1e-5, atol=1e-6)


def test_dropout_of_everything_has_finite_gradients():
    model = model_of(attention_dropout=1.0)
    gradient = jax.jit(jax.grad(lambda m: m(IDS, labels=IDS, dropout_key=jax.random.key(0)).loss))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(model)))


def test_generation_warns_of_right_padding_and_unimplemented_fields():
    model = model_of(eos_token_id=None)
    with pytest.warns(UserWarning, match="pad prompts on the left"):
        model.generate(IDS, jnp.ones_like(IDS).at[0, -1].set(0), max_new_tokens=2)
    steered = jax.tree.map(lambda leaf: leaf, model)
    steered.generation_config = GenerationConfig.from_dict(
        {"no_repeat_ngram_size": 3, "num_beams": 1, "repetition_penalty": 1.3}, model.config
    )
    with pytest.warns(UserWarning, match=r"{'no_repeat_ngram_size': 3} is not implemented"):
        steered.generate(IDS, max_new_tokens=2)


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    model = model_of(num_hidden_layers=1)
    value, gradient = jax.value_and_grad(lambda m: m(IDS, labels=jnp.full_like(IDS, -100)).loss)(
        model
    )
    assert value == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
