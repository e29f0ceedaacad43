"""A tiny checkpoint with quantized weights of a fixture; see `parity_tests.harness.quantized_fixtures`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llama_jax import LlamaConfig

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LAYER = "model.layers.0"
KEYS = f"{LAYER}.self_attn.k_proj"
_PLAIN = {
    "model.embed_tokens.weight": (32, 64),
    f"{LAYER}.input_layernorm.weight": (64,),
    f"{LAYER}.self_attn.q_proj.weight": (64, 64),
    f"{LAYER}.self_attn.v_proj.weight": (32, 64),
    f"{LAYER}.self_attn.o_proj.weight": (64, 64),
    f"{LAYER}.post_attention_layernorm.weight": (64,),
    f"{LAYER}.mlp.up_proj.weight": (96, 64),
    f"{LAYER}.mlp.down_proj.weight": (64, 96),
    "model.norm.weight": (64,),
    "lm_head.weight": (32, 64),
}

Tensors = dict[str, torch.Tensor]
Fields = dict[str, Any]


def write(
    directory: Path,
    name: str,
    change: Callable[[Tensors, Fields], None] | None = None,
    *,
    shards: int = 1,
) -> dict[str, dict[str, str]]:
    """Write a checkpoint whose k_proj and gate_proj are a fixture's, all else random.

    Args:
        change: of the tensors, and of what config.json says of the quantization.

    Returns:
        For each quantized weight the dtype and SHA-256 of what its program dequantizes.
    """
    generator = torch.Generator().manual_seed(1)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in _PLAIN.items()}
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    field, expected = metadata.pop("field"), json.loads(metadata.pop("expected"))
    quantization = json.loads(metadata.pop("config"))
    if change is not None:
        change(tensors, quantization)
    directory.mkdir(exist_ok=True)
    fields = CONFIG.to_dict() | {field: quantization}
    (directory / "config.json").write_text(json.dumps(fields))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata)
        return expected
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in names[shard::shards]}
        save_file(part, directory / file_name, metadata)
        weight_map |= dict.fromkeys(part, file_name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return expected


def digest(values: np.ndarray, dtype: str) -> str:
    """SHA-256 of the values after a cast."""
    tensor = torch.from_numpy(np.array(values)).to(getattr(torch, dtype)).contiguous()
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
