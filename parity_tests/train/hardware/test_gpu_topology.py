"""GPUs by name: what is parsed, what XLA is told of them, and their data sheets."""

from __future__ import annotations

import re

import pytest

from llama_jax.numerics.xla_options import GPU_MEMORY_FRACTION
from train.hardware.chips import CHIPS
from train.hardware.gpu_topology import parse_gpu_topology, target_config
from train.hardware.gpus import GPUS


@pytest.mark.parametrize(
    ("text", "name", "hosts", "gpus"),
    [
        ("h100:8", "h100", 1, 8),
        ("H100:8", "h100", 1, 8),
        ("h100:1", "h100", 1, 1),
        ("h100:3", "h100", 1, 3),
        ("h100:64x8", "h100", 64, 8),
        ("h100:64X8", "h100", 64, 8),
        ("a100-40gb:2x4", "a100-40gb", 2, 4),
        ("gb200:2x72", "gb200", 2, 72),
    ],
)
def test_topologies(text: str, name: str, hosts: int, gpus: int) -> None:
    assert parse_gpu_topology(text) == (GPUS[name], hosts, gpus)


@pytest.mark.parametrize(
    "text", ["v5p:4x4x4", "v6e:16x16", "V5E:2x2", "2xv5p:4x4x4", "tpu7x:2x2x1"]
)
def test_tpus_are_left_to_another_compiler(text: str) -> None:
    assert parse_gpu_topology(text) is None


@pytest.mark.parametrize(
    "text", ["h800:8", "rtx4090:1", "h1000", "hopper:8", "8", "", ":8", "mi300:8"]
)
def test_unknown_gpus(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_gpu_topology(text)
    message = str(caught.value)
    assert message.startswith(
        f"topology: found {text!r}, expected TPUs, such as v5p:4x4x4, or GPUs, such"
    )
    assert message.endswith(", ".join(GPUS))


@pytest.mark.parametrize(
    "shape",
    ["", ":", ":0", ":0x8", ":8x0", ":-8", ":x8", ":8x", ":2x4x2", ":8.0", ":eight", ": 8", ":8 "],
)
def test_wrong_counts(shape: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_gpu_topology(f"h100{shape}")
    assert str(caught.value) == (
        f"topology: found {'h100' + shape!r}, expected a number of GPUs, such as h100:8, or of hosts and "
        "the GPUs of each, such as h100:64x8"
    )


@pytest.mark.parametrize("name", GPUS)
def test_what_xla_is_told(name: str) -> None:
    gpu = GPUS[name]
    text = target_config(gpu)
    assert text.count("{") == text.count("}")
    values = dict(re.findall(r"(\w+): (\S+)", text))
    assert int(values["core_count"]) == gpu.cores
    assert int(values["device_memory_size"]) == gpu.memory
    assert int(values["shared_memory_per_block_optin"]) == gpu.shared_memory_of_block
    # each core keeps a kibibyte for itself
    assert gpu.shared_memory_of_block + 1024 == gpu.shared_memory
    major, minor = gpu.capability
    assert f"cuda_compute_capability {{ major: {major} minor: {minor} " in text
    # the instructions of one generation alone, such as wgmma
    accelerated = gpu.capability >= (9, 0)
    assert values["feature_extension"] == ("ACCELERATED_FEATURES" if accelerated else "NONE")
    assert f'device_description_str: "{gpu.name}"' in text


# bytes and bytes/s: what NVIDIA's data sheets say
SHEETS = {
    "a100": (80e9, 2.039e12),
    "a100-40gb": (40e9, 1.555e12),
    "h100": (80e9, 3.35e12),
    "h200": (141e9, 4.8e12),
    "b200": (180e9, 8e12),
    "b300": (288e9, 8e12),
    "gb200": (186e9, 8e12),
    "gb300": (288e9, 8e12),
}


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_data_sheet(name: str) -> None:
    gpu, (memory, bandwidth) = GPUS[name], SHEETS[name]
    chip = CHIPS[gpu.name]
    # a gigabyte of a data sheet is one of 10^9 or 2^30 bytes, less what the device keeps
    assert 0.98 * memory <= chip.memory <= 2**30 / 1e9 * memory
    assert chip.memory_bandwidth == pytest.approx(bandwidth, rel=0.05)
    assert chip.usable_memory == GPU_MEMORY_FRACTION * gpu.memory
    assert chip.network_bandwidth is not None
    assert chip.network_bandwidth < chip.link_bandwidth < chip.memory_bandwidth


def test_names_are_told_apart() -> None:
    assert len({gpu.name for gpu in GPUS.values()}) == len(GPUS)
