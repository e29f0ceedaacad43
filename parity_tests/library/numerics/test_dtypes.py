"""Every path in every dtype, grouping of heads and batch size, against float32 on the same weights.

The default tests hold one of each kind; `make test-all` runs all combinations.
"""

import dataclasses
import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LMHeadConfig,
    quantize,
)
from llama_jax.evaluation.scoring import token_scores
from llama_jax.generation import loop
from llama_jax.numerics.matmul import einsum, wide_einsum
from parity_tests.reference.errors import relative_error

DTYPES = ("float32", "bfloat16", "float16")
CACHES = (*DTYPES, "int8")
KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
# of the largest value: what two layers' roundings add up to, with room for another order of sums
BARS = {"float32": 1e-5, "float16": 6e-3, "bfloat16": 4e-2, "int8": 3e-2}
VOCAB, NEW = 97, 3


def config_of(heads: str, head_dim: int = 8, **changes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS[heads],
        head_dim=head_dim,
        max_position_embeddings=64,
        initializer_range=0.15,
        eos_token_id=None,
        pad_token_id=0,
        **changes,
    )


def widened(model):
    """The same weights, and the computation in float32."""
    structure, state = nnx.split(model)
    return nnx.merge(structure, jax.tree.map(lambda x: x.astype(jnp.float32), state))


@cache
def models(dtype: str, heads: str, head_dim: int = 8) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A model, and its reference."""
    config = config_of(heads, head_dim)
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    return model, widened(model)


forward = jax.jit(lambda model, ids, mask: model(ids, attention_mask=mask).logits)


def prompt_of(batch: int, length: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Prompts, the later rows padded on the left."""
    ids = np.random.default_rng(3).integers(1, VOCAB, (batch, length)).astype(np.int32)
    return ids, (np.arange(length)[None] >= 2 * np.arange(batch)[:, None]).astype(np.int32)


def generates(dtype, heads, batch, stacked, cache_dtype, monkeypatch, head_dim=8, bits=None):
    """Each row's scores are those of its own tokens alone in the reference; it takes the best of them."""
    model, reference = models(dtype, heads, head_dim)
    if bits is not None:
        model = quantize(model, bits, None if bits == 8 else 16)
        from llama_jax import dequantize

        reference = widened(dequantize(model))
    if stacked:
        monkeypatch.setattr(loop, "can_unstack", lambda model: False)
    ids, mask = prompt_of(batch)
    out = model.generate(ids, mask, max_new_tokens=NEW, cache_dtype=cache_dtype, output_scores=True)
    assert out.scores.dtype == jnp.float32
    bar = max(BARS[dtype], BARS[cache_dtype])
    sequences = np.asarray(out.sequences)
    is_token = np.concatenate([mask, np.ones((batch, NEW), np.int32)], axis=1)
    for row in range(batch):  # alone, right-aligned tokens only
        tokens = sequences[row][is_token[row] > 0][None]
        padded = np.pad(tokens, ((0, 0), (0, sequences.shape[1] - tokens.shape[1])))
        logits = forward(reference, padded, np.ones_like(padded))[0, : tokens.shape[1]]
        expected = np.asarray(logits[-NEW - 1 : -1])
        scale = np.abs(expected).max()
        assert np.abs(np.asarray(out.scores[row]) - expected).max() <= bar * scale
        taken = np.take_along_axis(expected, tokens[0, -NEW:, None], axis=1)[:, 0]
        assert (expected.max(-1) - taken <= 2 * bar * scale).all()


@pytest.mark.parametrize(
    ("dtype", "heads", "batch", "stacked", "cache_dtype"),
    [
        ("bfloat16", "gqa", 3, False, "bfloat16"),
        pytest.param("bfloat16", "gqa", 3, True, "int8", marks=pytest.mark.slow),
        pytest.param("float16", "gqa", 3, False, "float16", marks=pytest.mark.slow),
    ],
)
def test_generation(dtype, heads, batch, stacked, cache_dtype, monkeypatch):
    generates(dtype, heads, batch, stacked, cache_dtype, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "heads", "batch", "stacked", "cache_dtype"),
    list(itertools.product(DTYPES, KV_HEADS, (1, 3), (False, True), CACHES)),
)
def test_generation_of_every_kind(dtype, heads, batch, stacked, cache_dtype, monkeypatch):
    generates(dtype, heads, batch, stacked, cache_dtype, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("bfloat16", 8), ("bfloat16", 4), ("float16", 8), ("float16", 4), ("float32", 4)],
)
def test_generation_of_a_quantized_model(dtype, bits, monkeypatch):
    generates(dtype, "gqa", 3, False, dtype, monkeypatch, bits=bits)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 24, 26, 64])
def test_generation_of_odd_heads(dtype, head_dim, monkeypatch):
    generates(dtype, "gqa", 3, False, dtype, monkeypatch, head_dim=head_dim)


EVERY = [
    pytest.param(*kind, marks=() if kind == ("bfloat16", "gqa", 3, "plain") else pytest.mark.slow)
    for kind in itertools.product(DTYPES, KV_HEADS, (1, 3), ("plain", "blocked"))
]


@pytest.mark.parametrize(("dtype", "heads", "batch", "implementation"), EVERY)
def test_logits_score_and_training(dtype, heads, batch, implementation):
    model, reference = models(dtype, heads)
    bar = BARS[dtype]
    ids, mask = prompt_of(batch, 11)
    kept = mask[..., None] > 0
    ours, expected = (np.asarray(forward(m, ids, mask), np.float32) for m in (model, reference))
    assert np.abs((ours - expected) * kept).max() <= bar * np.abs(expected).max()
    scores = (token_scores(m, ids.tolist()) for m in (model, reference))
    for ours, expected in zip(*scores, strict=True):
        np.testing.assert_allclose(ours.log_probs, expected.log_probs, rtol=bar, atol=bar * 3)

    @jax.jit
    @jax.value_and_grad
    def step(model):
        return model(ids, labels=ids, attention_implementation=implementation).loss

    (loss, gradient), (expected_loss, expected_gradient) = step(model), step(reference)
    assert loss.dtype == jnp.float32
    assert abs(loss - expected_loss) <= bar * expected_loss
    for part, want in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        assert part.dtype == jnp.dtype(dtype)
        scale = float(jnp.max(jnp.abs(want)))
        assert float(jnp.max(jnp.abs(part.astype(jnp.float32) - want))) <= 2 * bar * scale


TASKS = {
    LlamaForSequenceClassification: lambda ids: {"labels": np.arange(len(ids)) % 2},
    LlamaForTokenClassification: lambda ids: {"labels": ids % 2},
    LlamaForQuestionAnswering: lambda ids: {
        "start_positions": np.full(len(ids), 1),
        "end_positions": np.full(len(ids), 4),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_task_heads(dtype, task):
    config = dataclasses.replace(config_of("gqa"), num_hidden_layers=1)
    model = task(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    ids, _ = prompt_of(3)
    step = jax.jit(jax.value_and_grad(lambda m: m(ids, **TASKS[task](ids)).loss))
    (loss, gradient), (want, want_gradient) = step(model), step(widened(model))
    assert abs(loss - want) <= BARS[dtype] * want
    for part, expected in zip(*map(jax.tree.leaves, (gradient, want_gradient)), strict=True):
        scale = float(jnp.max(jnp.abs(expected)))
        difference = jnp.max(jnp.abs(part.astype(jnp.float32) - expected))
        # the bias of question answering has no gradient but rounding
        assert float(difference) <= 2 * BARS[dtype] * scale + 1e-6


@pytest.mark.parametrize(
    ("dtype", "name", "implementation"),
    [
        pytest.param(*kind, marks=() if number == 4 else pytest.mark.slow)
        for number, kind in enumerate(
            itertools.product(DTYPES, ("default", "normalized"), ("default", "fused_linear"))
        )
    ],
)
def test_language_model_heads(dtype, name, implementation):
    config = LMHeadConfig(name=name, dtype=dtype, loss_implementation=implementation)
    head = config.build(d_model=24, vocab_size=VOCAB, rngs=nnx.Rngs(0), stddev=0.2)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 7, 24)), dtype)
    labels = jnp.asarray(rng.integers(0, VOCAB, (3, 7)), jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda h, x: h(x, labels=labels).loss, argnums=(0, 1)))
    loss, gradient = step(head, x)
    want, want_gradient = step(widened(head), x.astype(jnp.float32))
    assert abs(loss - want) <= BARS[dtype] * want
    for part, expected in zip(*map(jax.tree.leaves, (gradient, want_gradient)), strict=True):
        assert relative_error(part.astype(jnp.float32), expected) <= BARS[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_matmul_of_permuted_operands(dtype, jitted, rows):
    """Two transposes in a row, which XLA's CPU backend folds into a matmul that it does not support."""
    batch, n, g, k, d = 3, 2, 2, 32, 8
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(batch, n, g, rows, k)), dtype)
    store = jnp.asarray(rng.normal(size=(batch * n, k, d)), dtype)

    def matmul(weights, store):
        values = jnp.moveaxis(store.reshape(batch, n, k, d), 1, 2)
        out = einsum("bngqk,bknd->bqngd", weights, values)
        return out.reshape(batch, rows, -1)

    run = jax.jit(matmul) if jitted else matmul
    wide = [np.asarray(part, np.float64) for part in (weights, store)]
    expected = np.einsum("bngqk,bnkd->bqngd", wide[0], wide[1].reshape(batch, n, k, d))
    expected = expected.reshape(batch, rows, -1)
    assert np.abs(np.asarray(run(weights, store), np.float64) - expected).max() <= BARS[dtype] * 3
    mapped = jax.vmap(matmul)(weights[None], store[None])[0]
    assert np.abs(np.asarray(mapped, np.float64) - expected).max() <= BARS[dtype] * 3


SPECS = [
    "bngqk,bknd->bqngd",
    "bqngd,bknd->bngqk",
    "bngqk,bnkd->bngqd",
    "bnqk,bnqd->bnkd",
    "ti,oi->to",
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(60))
def test_matmuls_of_any_layout_accumulate_in_float32(dtype, seed):
    rng = np.random.default_rng(seed)
    spec = SPECS[seed % len(SPECS)]
    of_a, of_b = spec.split("->")[0].split(",")
    sizes = {letter: int(rng.choice([1, 2, 3, 24, 32])) for letter in sorted(set(of_a + of_b))}
    operands, orders = [], []
    for letters in (of_a, of_b):
        order = rng.permutation(len(letters))
        shape = [sizes[letters[i]] for i in order]
        operands.append(jnp.asarray(rng.normal(size=shape), dtype))
        orders.append(np.argsort(order))

    def matmul(a, b):
        turned = [jnp.transpose(x, order) for x, order in zip((a, b), orders, strict=True)]
        return wide_einsum(spec, *turned, jnp.float32)

    wide = [
        np.transpose(np.asarray(x, np.float64), o) for x, o in zip(operands, orders, strict=True)
    ]
    np.testing.assert_allclose(
        jax.jit(matmul)(*operands), np.einsum(spec, *wide), rtol=1e-5, atol=1e-5
    )
