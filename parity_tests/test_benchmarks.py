"""Parts of the benchmarks: emulated precision, drift from the oracle, presets grouped by shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn.functional import cross_entropy, kl_div

from benchmarks.parity import same_shapes
from benchmarks.precision import BFLOAT16, TF32, drift, emulated, emulated_einsum
from llama_jax import PRESETS, LlamaConfig, LlamaForCausalLM

# Rounding to b bits leaves a uniform error of one ulp / sqrt(12); of normal numbers that is 0.21 * 2**-b.
ROUNDED = 0.21


def rms_error(bits: int, parts: int) -> float:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=size).astype(np.float32) for size in ((64, 256), (256, 64)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    einsum = jax.jit(emulated_einsum, static_argnames=("spec", "bits", "parts"))
    values = np.asarray(einsum("ij,jk->ik", a, b, bits=bits, parts=parts))
    return float(np.sqrt(np.mean(np.square(values - exact)) / np.mean(np.square(exact))))


@pytest.mark.parametrize("bits", [BFLOAT16, TF32])
def test_one_pass_has_the_error_of_rounding_both_operands(bits: int) -> None:
    assert rms_error(bits, 1) == pytest.approx(2**0.5 * ROUNDED * 2.0**-bits, rel=0.1)


def test_three_passes_have_second_order_errors_and_six_those_of_float32() -> None:
    # what two roundings leave of each operand, and the product of what one leaves of both
    assert rms_error(BFLOAT16, 2) == pytest.approx(
        3**0.5 * (ROUNDED * 2.0**-BFLOAT16) ** 2, rel=0.1
    )
    assert rms_error(BFLOAT16, 3) < 4e-7


def test_every_matmul_of_the_model_is_emulated() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    ids = jnp.ones((1, 8), jnp.int32)

    def matmuls() -> int:
        traced = jax.make_jaxpr(lambda model: model(ids).logits)(model)
        return str(traced).count("dot_general[")

    plain = matmuls()
    assert plain
    for parts, passes in ((1, 1), (2, 3), (3, 6)):
        with emulated(BFLOAT16, parts):
            assert matmuls() == passes * plain
    assert matmuls() == plain


def test_drift_in_blocks_is_drift_at_once() -> None:
    torch.manual_seed(0)
    exact = torch.randn(150, 11, dtype=torch.float64)
    logits = (exact + 0.1 * torch.randn(150, 11)).float()
    ids = torch.randint(11, (1, 150))
    errors = (logits - exact).square().mean(1) / exact.square().mean(1)
    logs = [values.double().log_softmax(-1) for values in (exact, logits)]
    losses = [cross_entropy(values[:-1], ids[0, 1:]) for values in logs]
    assert drift(logits.numpy(), exact, ids.numpy()) == pytest.approx(
        (
            float(errors.mean().sqrt()),
            float(kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")),
            float((logits.argmax(1) == exact.argmax(1)).double().mean()),
            float(losses[1] - losses[0]),
        )
    )


def test_presets_of_the_same_shape_share_a_row() -> None:
    groups = same_shapes(list(PRESETS))
    assert sorted(name for names in groups for name in names) == sorted(PRESETS)
    assert ["llama-7b", "llama-2-7b"] in groups
    assert ["llama-3-70b", "llama-3.1-70b"] in groups
    assert ["llama-2-70b"] in groups  # another vocabulary
