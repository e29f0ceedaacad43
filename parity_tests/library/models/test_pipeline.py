"""Layers over the stages of a pipeline: the values and gradients of a scan, and what stages send."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llama_jax import LlamaConfig, LlamaModel, init_cache
from llama_jax.models.pipeline import Pipeline
from parity_tests.harness.child_process import output_lines
from parity_tests.reference.tolerances import ROUNDING_RATIO


def results_of(*arguments):
    rows = map(json.loads, output_lines("workers.pipelined_layers", *arguments))
    return {row["case"]: row for row in rows}


@pytest.fixture(scope="module")
def results():
    return results_of()


@pytest.fixture(scope="module")
def slow_results():
    return results_of("slow")


@pytest.mark.parametrize("name", ["stage2-fsdp2-tensor2", "stage4-repeats2-dropout"])
def test_the_same_loss_and_gradients(results, name):
    """Of packed documents; the dropout of every row is that of one device."""
    assert max(results[name]["errors"]) <= 1e-13


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["stage4", "stage4-repeats2", "stage2-repeats4", "blocked-attention", "without-a-pipeline"],
)
def test_the_same_loss_and_gradients_slow(slow_results, name):
    assert max(slow_results[name]["errors"]) <= 1e-13


def test_gradients_of_micro_batches_are_summed_in_float32(results):
    """Summed in bfloat16, 64 micro-batches would round 2.8 times as much as one batch."""
    row = results["bfloat16"]
    print(row)
    assert 0 < row["rms"] <= ROUNDING_RATIO * row["rms_of_one_device"]


@pytest.mark.slow
def test_float32(slow_results):
    row = slow_results["float32"]
    print(row)
    assert 0 < row["rms"] <= ROUNDING_RATIO * row["rms_of_one_device"]


def test_stages_send_micro_batches_and_no_weights(results):
    """One in every iteration, and half of the rows to the first stage and from it; the same backward."""
    pipeline, stages = Pipeline(4), 2
    rows = 8 * 16 * 32 * 8 // (2 * 2)  # bytes, of a device of fsdp 2 x tensor 2
    micro_batch, half = rows // pipeline.micro_batches, rows // stages
    sent = [["collective-permute", 1, half]] * 4
    sent += [["collective-permute", pipeline.iterations(stages), micro_batch]] * 2
    assert results["stage2-fsdp2-tensor2"]["over_stages"] == sorted(sent)


def test_interleaved_stages_exchange_weights_once(results):
    """No more than the weights, forward, and their gradients, in pieces; nothing is gathered."""
    found = results["stage4-repeats2-dropout"]["over_stages"]
    assert {kind for kind, *_ in found} == {"collective-permute"}
    in_loop = [row for row in found if row[1] > 1]
    assert in_loop == [["collective-permute", Pipeline(4, 2).iterations(4), 2 * 16 * 32 * 8]] * 2


CONFIG = LlamaConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=6,
    num_attention_heads=2,
)


def test_the_share_of_idle_iterations():
    """Section 2.2 of arXiv:2104.04473: of the rest, (stages - 1) / (repeats * micro-batches)."""
    for stages, micro_batches, repeats in ((4, 8, 1), (4, 8, 2), (2, 16, 4)):
        bubble = Pipeline(micro_batches, repeats).bubble(stages)
        assert bubble / (1 - bubble) == pytest.approx((stages - 1) / (repeats * micro_batches))


@pytest.mark.parametrize(
    ("pipeline", "stages", "rows", "message"),
    [
        (Pipeline(2), 1, 4, "no mesh with an axis 'stage' larger than 1"),
        (Pipeline(4), 4, 4, "4 stages x 1 repeats, expected their product to be a divisor of 6 layers"),
        (Pipeline(4, 2), 2, 4, "2 stages x 2 repeats, expected their product to be a divisor of 6 layers"),
        (Pipeline(4, 0), 2, 4, "2 stages x 0 repeats, expected their product to be a divisor of 6 layers"),
        (Pipeline(3), 2, 6, "3 micro-batches, expected a multiple of 2 stages and a divisor of 6 rows"),
        (Pipeline(4), 2, 6, "4 micro-batches, expected a multiple of 2 stages and a divisor of 6 rows"),
        (Pipeline(0), 2, 6, "0 micro-batches, expected a multiple of 2 stages and a divisor of 6 rows"),
    ],
)  # fmt: skip
def test_what_does_not_fit(pipeline, stages, rows, message):
    with pytest.raises(ValueError) as caught:
        pipeline.require_fit(stages, 6, rows)
    assert str(caught.value) == f"pipeline: found {message}" + (
        ", expected one in jax.set_mesh" if stages == 1 else ""
    )


def test_misuse():
    model = nnx.eval_shape(lambda: LlamaModel(CONFIG, rngs=nnx.Rngs(0)))
    ids, pipeline = jnp.zeros((4, 5), jnp.int32), Pipeline(2)
    with pytest.raises(ValueError, match="no mesh with an axis 'stage'"):
        jax.eval_shape(lambda: model(ids, pipeline=pipeline))
    cache = init_cache(CONFIG, batch=4, capacity=8, dtype=jnp.float32)
    for option in (
        {"cache": cache},
        {"output_hidden_states": True},
        {"output_attentions": True},
    ):
        with pytest.raises(
            ValueError, match=r"^pipeline: found it with .* call without a pipeline"
        ):
            model(ids, pipeline=pipeline, **option)
