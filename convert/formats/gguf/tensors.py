"""The tensors of a GGUF Llama under Hugging Face's names, dequantized and in Hugging Face's row order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from convert.formats.gguf.header import GgufHeader, GgufTensor
from convert.formats.llama_tensors import renamed, rotary_heads, tensor_shapes, to_halves
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.buffers import empty
from llama_jax.files.reading import fill, open_file

PLAIN_DTYPES: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_MODULES = {  # Hugging Face's -> llama.cpp's
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
ROPE_FREQS = "rope_freqs.weight"  # no weight of the model: read as configuration
_IGNORED = (ROPE_FREQS, "attn_rot_embd.weight")
_CHUNK = 2**22  # values dequantized at a time: bounds the library's temporaries


def gguf_name(name: str) -> str:
    """llama.cpp's name of the tensor that Hugging Face calls `name`."""
    return renamed(name, _MODULES, layers="blk")


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor and where its values come from."""

    spec: TensorSpec
    tensor: GgufTensor | None
    """None: the file leaves it out, and it is zeros."""
    heads: int = 0
    """Over how many heads the rows are reordered; 0 where they are not."""

    def read(self) -> np.ndarray:
        """The values, in Hugging Face's row order."""
        if self.tensor is None:
            return np.zeros(self.spec.shape, self.spec.dtype)
        return to_halves(read_values(self.tensor), self.heads)


def map_tensors(
    header: GgufHeader, config: LlamaConfig
) -> tuple[dict[str, Source], list[str], list[str]]:
    """Where every tensor of the model comes from.

    Returns:
        Sources by Hugging Face's names, in the model's order; problems, one for each tensor that is
        missing, unexpected, misshapen or of an unreadable type; and notes.
    """
    sources: dict[str, Source] = {}
    problems: list[str] = []
    biased = {stored.split(".")[-2] for stored in header.tensors if stored.endswith(".bias")}
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        stored = gguf_name(name)
        tensor = header.tensors.get(stored)
        if name.endswith(".bias") and stored.split(".")[-2] not in biased:
            # llama.cpp takes each bias by itself; Hugging Face has all of a block's or none
            sources[name] = Source(TensorSpec(name, np.dtype(np.float32), shape), None)
        elif tensor is None:
            problems.append(f"tensor {stored} is missing, expected {list(shape)}")
        elif tensor.shape != shape:
            problems.append(f"tensor {stored} is {list(tensor.shape)}, expected {list(shape)}")
        elif not _readable(tensor.type):
            problems.append(
                f"tensor {stored} has type {tensor.type.name}, which cannot be dequantized"
            )
        else:
            spec = TensorSpec(name, _dtype(tensor.type), shape)
            sources[name] = Source(spec, tensor, rotary_heads(name, config))
    problems += _rope_freqs_problems(header, config.head_size // 2)
    known = {gguf_name(name) for name in shapes}
    problems += [
        f"tensor {stored} does not belong to a Llama"
        for stored in header.tensors
        if stored not in known and not stored.endswith(_IGNORED)
    ]
    zeros = [source for source in sources.values() if source.tensor is None]
    notes = [f"{len(zeros)} biases that the file leaves out are written as zeros"] if zeros else []
    return sources, problems, notes


def _rope_freqs_problems(header: GgufHeader, half: int) -> list[str]:
    tensor = header.tensors.get(ROPE_FREQS)
    if tensor is None or (tensor.shape == (half,) and tensor.type == GGMLQuantizationType.F32):
        return []
    return [f"tensor {ROPE_FREQS} is {tensor.type.name}{list(tensor.shape)}, expected F32[{half}]"]


def _dtype(type_: GGMLQuantizationType) -> np.dtype[Any]:
    return PLAIN_DTYPES.get(type_, np.dtype(np.float32))


def _readable(type_: GGMLQuantizationType) -> bool:
    if type_ in PLAIN_DTYPES:
        return True
    try:  # the library's table of what it can dequantize is private: try it
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def read_values(tensor: GgufTensor) -> np.ndarray:
    """A tensor's values, as stored for F32, F16 and BF16, otherwise dequantized to float32.

    Peak memory is the result and a few megabytes: blocks are read and dequantized in groups of rows.
    """
    out = empty(tensor.shape, _dtype(tensor.type))
    rows = out.reshape(-1, tensor.shape[-1])
    row_bytes = tensor.nbytes // len(rows) if len(rows) else 0
    step = max(1, _CHUNK // max(1, tensor.shape[-1]))
    with open_file(tensor.path, tensor.offset + tensor.nbytes) as file:
        file.seek(tensor.offset)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            data = np.empty(len(part) * row_bytes, np.uint8)
            if fill(file, data.data) != data.size:
                raise ValueError(f"{tensor.path}: ends within tensor {tensor.name}")
            if tensor.type in PLAIN_DTYPES:
                part[...] = data.view(out.dtype).reshape(part.shape)
            else:
                with np.errstate(all="ignore"):  # damaged scales give NaN, which the cast reports
                    part[...] = dequantize(data.reshape(len(part), row_bytes), tensor.type)
    return out
