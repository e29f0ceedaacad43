"""The estimate's terms, each against a number worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_jax.models.pipeline import Pipeline
from llama_jax.numerics.remat_policy import Kept
from llama_jax.presets import PRESETS
from train.hardware.chips import Chip
from train.options import ModelOptions, RunOptions
from train.plan.estimate import (
    DEFAULT_CHIP,
    Setting,
    activation_bytes,
    data_parallel_traffic,
    estimate,
    gradient_bytes,
    head_bytes,
    kept_numbers,
    link_seconds,
    measure,
    pipeline_traffic,
    sequence_parallel_traffic,
    state_bytes,
    tensor_parallel_traffic,
    weight_traffic,
)

CONFIG = replace(
    PRESETS["tiny-4m"],
    hidden_size=100,
    intermediate_size=300,
    num_hidden_layers=3,
    num_attention_heads=10,
    num_key_value_heads=2,
    head_dim=10,
    vocab_size=1000,
)
# bfloat16 over float32, on a single device
ALONE = Setting(
    config=CONFIG,
    parameters=1_000_000,
    remat="dots",
    micro_batches=1,
    parameter_bytes=4,
    moment_bytes=4,
    average_bytes=0,
    compute_bytes=2,
    reduce_bytes=4,
    data=1,
    sequence=1,
    tensor=1,
    parameter_shards=1,
    tokens=500.0,
)


def test_one_device_sends_nothing() -> None:
    traffic = (
        weight_traffic,
        tensor_parallel_traffic,
        sequence_parallel_traffic,
        data_parallel_traffic,
    )
    assert [kind(ALONE) for kind in traffic] == [0, 0, 0, 0]


def test_memory() -> None:
    assert state_bytes(ALONE) == 12_000_000
    assert state_bytes(ALONE._replace(moment_bytes=2)) == 8_000_000
    assert state_bytes(ALONE._replace(moment_bytes=0)) == 4_000_000
    assert state_bytes(ALONE._replace(average_bytes=4)) == 16_000_000
    assert gradient_bytes(ALONE) == 6_000_000
    # weights and a gradient in bfloat16, a sum in float32, all of it complete; a quarter of the result
    once = ALONE._replace(parameter_shards=4, gathered_over=4, micro_batches=2)
    assert gradient_bytes(once) == 8_000_000 + 1_000_000
    assert gradient_bytes(once._replace(micro_batches=1)) == 4_000_000 + 1_000_000
    assert state_bytes(ALONE._replace(parameter_shards=8)) == 1_500_000
    assert head_bytes(ALONE) == 1000 * 100 * (2 + 2 + 4) + 500 * 100 * 4
    dots = 100 + (100 + 20 + 20 + 100 + 100) + (300 + 300 + 100)
    assert kept_numbers(CONFIG, "full") == 100
    assert kept_numbers(CONFIG, "dots") == dots
    assert kept_numbers(CONFIG, "none") == dots + 600 + 120 + 600
    assert kept_numbers(CONFIG, Kept(("key", "gate"))) == 100 + 20 + 300
    assert kept_numbers(CONFIG, Kept(("key", "gate"), ("input", "up")), tensor=2) == 10 + 150
    assert kept_numbers(CONFIG, "full", tensor=2) == 50
    assert kept_numbers(CONFIG, "dots", tensor=2) == dots / 2
    # but for the outputs of the norms, which are kept as gathered
    assert kept_numbers(CONFIG, "none", tensor=2) == (dots + 600 + 120 + 600) / 2 + 2 * 50
    assert activation_bytes(ALONE) == 500 * 3 * dots * 2
    assert activation_bytes(ALONE._replace(micro_batches=5)) == 100 * 3 * dots * 2


@pytest.mark.parametrize(("remat", "forward_passes"), [("dots", 1), ("full", 2)])
def test_traffic(remat, forward_passes: int) -> None:
    alone = ALONE._replace(remat=remat)
    # two gathers of 2 MB, and an all-reduce, which sends 4 MB twice
    sharded = alone._replace(parameter_shards=4)
    assert weight_traffic(sharded) == 12_000_000
    assert weight_traffic(sharded._replace(reduce_bytes=2)) == 8_000_000
    assert weight_traffic(sharded._replace(micro_batches=3)) == 36_000_000
    # once, and if they are also split over a sequence axis, over that for each micro-batch
    once = sharded._replace(gathered_over=4, micro_batches=3)
    assert weight_traffic(once) == 2_000_000 + 8_000_000
    split = once._replace(parameter_shards=8, sequence=2)
    assert weight_traffic(split) == (2_000_000 + 8_000_000) / 2 + 36_000_000
    # float32 gradients, all-reduced
    replicas = alone._replace(data=2, micro_batches=3)
    assert data_parallel_traffic(replicas) == 8_000_000
    assert data_parallel_traffic(replicas._replace(reduce_bytes=2)) == 4_000_000
    # with dropout for each micro-batch
    dropout = replace(replicas.config, attention_dropout=0.1)
    assert data_parallel_traffic(replicas._replace(config=dropout)) == 3 * 8_000_000
    # beside a tensor axis for each micro-batch, unless fsdp does it once as well
    halves = replicas._replace(tensor=2, parameter_shards=2)
    assert data_parallel_traffic(halves) == 3 * 4_000_000
    quarters = halves._replace(parameter_shards=4, gathered_over=2)
    assert data_parallel_traffic(quarters) == 2_000_000
    # activations of 500 x 100 numbers in three layers: gathered in bfloat16, summed in float32
    passes = forward_passes + 1
    tensor = alone._replace(tensor=2, parameter_shards=2)
    each = 500 * 100 * (6 * 2 + {"dots": 4, "full": 5}[remat] * 4)
    assert tensor_parallel_traffic(tensor) == 3 * each
    # keys and values of two heads of 10, of rows over both devices
    sequence = alone._replace(sequence=2, parameter_shards=2)
    assert sequence_parallel_traffic(sequence) == passes * 3 * (1000 * 2 * 20 * 2)


def test_a_pipeline() -> None:
    assert pipeline_traffic(ALONE) == 0
    staged = ALONE._replace(stages=2, pipeline=Pipeline(4), parameter_shards=4)
    # a stage has 1000 tokens of 100 numbers, in four parts: five times a part in and out, and all of them
    # gathered and scattered in both directions
    rows = 1000 * 100 * 2
    assert pipeline_traffic(staged) == 2 * 5 * rows / 4 + 4 * rows
    # half of the weights, for each of the five times, and of a third of them, for 13
    assert weight_traffic(staged) == 5 * 6_000_000
    thirds = staged._replace(pipeline=Pipeline(4, 3))
    assert weight_traffic(thirds) == 13 * 6_000_000 / 3
    # and the weights that stages exchange, 1/8 of them on a device
    assert pipeline_traffic(thirds) == 2 * 13 * rows / 4 + 4 * rows + 2 * 250_000
    assert state_bytes(staged) == 1_500_000
    assert activation_bytes(staged) == activation_bytes(ALONE) * 5 / 4


def test_a_configuration_over_a_mesh() -> None:
    options = RunOptions(
        batch_size=8, sequence_length=64, model=ModelOptions(compute_dtype="bfloat16", remat="full")
    )
    model = measure(CONFIG, 64)
    cost = estimate(options, model, {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}, None)
    # forward, forward again, and twice that backward
    assert cost.compute == 4 * model.forward_flops * 8 * 64 / 4 / DEFAULT_CHIP.flops
    sent = model.parameters * (2 * 2 + 4 * 2) + model.parameters / 2 * 4 * 2
    assert cost.sent == sent
    assert cost.links == sent / DEFAULT_CHIP.link_bandwidth
    rounded = replace(options, model=replace(options.model, reduce_dtype="bfloat16"))
    mesh = {"data": 2, "fsdp": 2}
    assert estimate(rounded, model, mesh, None).sent == model.parameters * 8 + model.parameters * 2
    assert cost.state == model.parameters * 12 / 2
    # of a layer's weights, 100 x (100 + 20 + 20 + 100 + 3 x 300), only gate is not computed again
    kept = replace(options.model, remat_save=("gate",), remat_offload=("input",))
    moved = replace(options.optimizer, offload=True)
    mesh = {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    changed = estimate(replace(options, model=kept, optimizer=moved), model, mesh, None)
    assert changed.compute / cost.compute == pytest.approx((4 - 300 / 1140) / 4)
    assert changed.state == model.parameters * 4 / 2
    assert changed.activations == cost.activations * 3
    assert cost.peak == cost.state + cost.gradients + cost.activations + cost.head


@pytest.mark.parametrize(
    ("shape", "between_hosts"),
    [
        # devices of a group on one host carry a part of its ring each
        ({"parameter_shards": 8}, 12_000_000 / 4),
        ({"parameter_shards": 4}, 0),
        ({"parameter_shards": 4, "data": 2}, 8_000_000 / 4),
        ({"parameter_shards": 2, "data": 4}, 8_000_000 * 2 / 4 / 2),
        # of two fsdp groups of eight in hosts of four, their devices being two apart
        ({"parameter_shards": 16, "tensor": 2}, 12_000_000 / 2 / 2),
    ],
)
def test_the_network_between_hosts(shape: dict[str, int], between_hosts: float) -> None:
    chip = Chip(1.0, 1.0, 1.0, link_bandwidth=1e30, network_bandwidth=10.0)
    setting = ALONE._replace(**shape, linked=4)
    assert link_seconds(setting, chip) == pytest.approx(between_hosts / 10)
    assert link_seconds(setting._replace(linked=None), chip) < 1e-20
    # links within a host that are slower than their share of the network
    slow = chip._replace(link_bandwidth=1e-3)
    sent = link_seconds(setting, slow) * 1e-3
    assert sent >= between_hosts
    assert sent == pytest.approx(link_seconds(setting._replace(linked=None), slow) * 1e-3)
