"""Write a Hugging Face directory of random weights, one tensor in memory at a time."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from llama_jax.checkpoints.safetensors_write import TensorSpec, write_safetensors
from llama_jax.config import LlamaConfig
from llama_jax.inspection.architecture import tensors

_BLOCK = 1 << 22  # values drawn at a time, in float32
_NORM_NOISE = 0.1  # if all norms were one, swapping them would not show


def write_random(
    config: LlamaConfig, directory: Path, max_shard_size: int = 5_000_000_000
) -> list[TensorSpec]:
    """Write bfloat16 weights, normal with the config's `initializer_range`, and norms around one.

    Returns the specs of the tensors.
    """
    dtype = np.dtype(ml_dtypes.bfloat16)
    specs = [TensorSpec(tensor.name, dtype, tensor.shape) for tensor in tensors(config)]
    shapes = {spec.name: spec.shape for spec in specs}
    random = np.random.default_rng(0)

    def values(name: str) -> np.ndarray:
        is_norm = name.endswith("norm.weight")
        mean, deviation = (1, _NORM_NOISE) if is_norm else (0, config.initializer_range)
        out = np.empty(shapes[name], dtype)
        flat = out.reshape(-1)
        for start in range(0, len(flat), _BLOCK):
            block = flat[start : start + _BLOCK]
            block[...] = mean + np.float32(deviation) * random.standard_normal(
                len(block), np.float32
            )
        return out

    directory.mkdir(exist_ok=True)
    write_safetensors(directory, specs, values, max_shard_size=max_shard_size)
    fields = config.to_dict() | {"torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(fields))
    return specs
