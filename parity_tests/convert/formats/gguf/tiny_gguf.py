"""Tiny GGUF Llamas, written with the gguf library the way llama.cpp's converter writes large ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize
from transformers import LlamaConfig, LlamaForCausalLM

F32, F16, BF16 = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
)

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_model(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A random Hugging Face Llama in float32 whose biases and norms are not their trivial values."""
    fields: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(fields | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor -> llama.cpp's."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's reordering of query and key rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """A model's weights as llama.cpp stores them, float32."""
    config = model.config
    result = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy().copy()
        if ".q_proj." in name:
            values = permute(values, config.num_attention_heads)
        elif ".k_proj." in name:
            values = permute(values, config.num_key_value_heads)
        result[gguf_name(name)] = values
    return result


def llama3_tensor(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """`rope_freqs.weight` as llama.cpp's converter works it out: float32 throughout."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return np.array(factors, np.float32)


def metadata(model: LlamaForCausalLM) -> dict[str, Any]:
    """The hyperparameters llama.cpp's converter writes; floats become float32."""
    config = model.config
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }


def write_gguf(
    path: Path,
    tensors: dict[str, Any],
    fields: dict[str, Any],
    *,
    type_: GGMLQuantizationType = F32,
    architecture: str = "llama",
) -> Path:
    """Write a GGUF file; matrices as `type_`, vectors as F32. A field that is None is left out.

    A tensor given as (bytes [rows, row bytes], type) is written as it is.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in fields.items():
        _add(writer, key, value)
    for name, values in tensors.items():
        if isinstance(values, tuple):
            writer.add_tensor(name, values[0], raw_dtype=values[1])
        elif values.ndim == 1 or type_ == F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value and isinstance(value[0], int):
        writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.INT32)
    else:
        writer.add_array(key, value)


def tiny_gguf(path: Path, model: LlamaForCausalLM | None = None, **options: Any) -> Path:
    """A whole tiny file. `fields` and `tensors` are laid over the model's own, None removes."""
    model = model or tiny_model()
    fields = metadata(model) | options.pop("fields", {})
    tensors = gguf_tensors(model) | options.pop("tensors", {})
    tensors = {name: values for name, values in tensors.items() if values is not None}
    return write_gguf(path, tensors, fields, **options)


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not bitwise equal, or that only one side has."""
    names: Iterable[str] = sorted(tensors.keys() | expected.keys())
    return [
        name
        for name in names
        if name not in tensors
        or name not in expected
        or tensors[name].dtype != expected[name].dtype
        or not torch.equal(tensors[name], expected[name])
    ]
