"""Which implementation of attention a call takes, and the reason that is given for it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from llama_jax.attention.dispatch import PLAIN_LENGTH, choose_implementation
from llama_jax.attention.masks import AttentionMask

SEGMENTS = jnp.zeros((2, 256), jnp.int32)
PACKED = AttentionMask(query_segments=SEGMENTS, key_segments=SEGMENTS)
SLOTS = jnp.arange(256, dtype=jnp.int32)
PREFILL = AttentionMask(SLOTS, SLOTS, jnp.ones((2, 256), bool), SEGMENTS, SEGMENTS)
NOT_FOR_CUDNN = "cudnn: found padding or segments, expected neither: cuDNN takes them only as a "


def choice(platform, *, dim=64, seq=256, dtype=jnp.bfloat16, mask=PACKED, shards=1, **options):
    """On devices that need not exist: `target_platform` asks the ambient mesh."""
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = AbstractMesh(
        (shards,), ("sequence",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    options = {"implementation": None, "needs_weights": False} | options
    query = jnp.zeros((2, seq, 4, dim), dtype)
    with jax.sharding.use_abstract_mesh(mesh):
        return choose_implementation(query=query, mask=mask, **options)


@pytest.mark.parametrize(
    ("platform", "options", "implementation", "reason"),
    [
        ("gpu", {"mask": AttentionMask()}, "cudnn", None),
        (
            "gpu",
            {"mask": PREFILL},
            "triton",
            "cudnn: found a part of the sequence, expected the full sequence",
        ),
        ("gpu", {}, "triton", NOT_FOR_CUDNN + "[q, k] bias"),
        (
            "gpu",
            {"dtype": jnp.float32},
            "blocked",
            "cudnn: found float32, expected bfloat16 or float16; "
            "triton: found float32, expected bfloat16 or float16",
        ),
        (
            "gpu",
            {"mask": AttentionMask(visible_until=SEGMENTS)},
            "blocked",
            "cudnn: found visible_until, expected none; triton: found visible_until, expected none",
        ),
        (
            "tpu",
            {"mask": AttentionMask(visible_until=SEGMENTS)},
            "blocked",
            "splash: found visible_until, expected none",
        ),
        ("tpu", {}, "splash", None),
        (
            "tpu",
            {"seq": 200},
            "blocked",
            "splash: found 200 tokens, expected a multiple of 128 on each of 1 shards",
        ),
        (
            "tpu",
            {"shards": 4},
            "blocked",
            "splash: found 256 tokens, expected a multiple of 128 on each of 4 shards",
        ),
        ("cpu", {}, "blocked", "no kernel for cpu"),
        ("cpu", {"seq": PLAIN_LENGTH}, "plain", "up to 128 tokens it is the fastest"),
        ("gpu", {"implementation": "blocked"}, "blocked", "requested"),
    ],
)
def test_choice(platform, options, implementation, reason):
    assert choice(platform, **options) == (implementation, reason)


@pytest.mark.parametrize("platform", ["gpu", "tpu", "cpu"])
def test_plain_says_what_keeps_the_others_from_serving(platform):
    implementation, reason = choice(platform, needs_weights=True)
    assert implementation == "plain"
    assert reason.endswith("blocked: found attention weights or dropout of them, expected neither")


@pytest.mark.parametrize(
    ("capability", "implementation"),
    [
        (None, "triton"),
        ("8.0", "triton"),
        ("12.0", "triton"),
        ("7.5", "blocked"),
        ("gfx942", "blocked"),
    ],
)
def test_gpus_older_than_ampere_and_those_of_others_have_no_kernel(
    capability, implementation, monkeypatch
):
    monkeypatch.setattr("llama_jax.attention.cudnn.gpu_capability", lambda: capability)
    assert choice("gpu").implementation == implementation
    expected = implementation if implementation == "blocked" else "cudnn"
    assert choice("gpu", mask=AttentionMask()).implementation == expected
