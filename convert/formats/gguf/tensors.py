"""The tensors of a GGUF Llama under Hugging Face's names, dequantised and in Hugging Face's row order.

The rows of the query and key projections are in the other of the two orders (see
`convert.formats.rotary_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from convert.formats.gguf.header import GgufHeader, GgufTensor
from convert.formats.rotary_rows import to_halves
from llama_jax.checkpoints.safetensors_write import TensorSpec

PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {  # Hugging Face's modules -> llama.cpp's
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
_CHUNK = 2**22  # values dequantised at a time: bounds the library's temporaries
_IGNORED = ("rope_freqs.weight", "attn_rot_embd.weight")  # the first is read as configuration


def gguf_name(name: str) -> str:
    """llama.cpp's name of the tensor that Hugging Face calls `name`."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{_NAMES[inner]}.{kind}"
    return f"{_NAMES[module]}.{kind}"


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor and where its values come from; no tensor means zeros."""

    spec: TensorSpec
    tensor: GgufTensor | None
    heads: int = 0
    """Over how many heads the rows are interleaved; 0 where they are not."""

    def read(self) -> np.ndarray:
        """The values, in Hugging Face's row order."""
        if self.tensor is None:
            return np.zeros(self.spec.shape, self.spec.dtype)
        values = read_values(self.tensor)
        return to_halves(values, self.heads) if self.heads else values


def map_tensors(
    header: GgufHeader, config: dict[str, Any], faults: list[str], notes: list[str]
) -> dict[str, Source]:
    """Hugging Face name -> source, in the model's order; what does not fit goes to `faults`."""
    sources: dict[str, Source] = {}
    used: set[str] = set()

    def add(name: str, shape: tuple[int, ...], heads: int = 0) -> None:
        stored = gguf_name(name)
        tensor = header.tensors.get(stored)
        used.add(stored)
        if tensor is None:
            faults.append(f"tensor {stored} is missing, expected {list(shape)}")
        elif tensor.shape != shape:
            faults.append(f"tensor {stored} is {list(tensor.shape)}, expected {list(shape)}")
        elif not _readable(tensor.type):
            faults.append(
                f"tensor {stored} has type {tensor.type.name}, which cannot be dequantised"
            )
        else:
            sources[name] = Source(TensorSpec(name, _dtype(tensor.type), shape), tensor, heads)

    e, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h, k, d = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    projections = {
        "self_attn.q_proj": (h * d, e, h),
        "self_attn.k_proj": (k * d, e, k),
        "self_attn.v_proj": (k * d, e, 0),
        "self_attn.o_proj": (e, h * d, 0),
        "mlp.gate_proj": (f, e, 0),
        "mlp.up_proj": (f, e, 0),
        "mlp.down_proj": (e, f, 0),
    }
    layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
    biased = {
        module
        for module in projections
        if any(gguf_name(f"{layer}.{module}.bias") in header.tensors for layer in layers)
    }
    add("model.embed_tokens.weight", (v, e))
    for layer in layers:
        add(f"{layer}.input_layernorm.weight", (e,))
        add(f"{layer}.post_attention_layernorm.weight", (e,))
        for module, (rows, columns, heads) in projections.items():
            name = f"{layer}.{module}"
            add(f"{name}.weight", (rows, columns), heads)
            if module in biased:
                add(f"{name}.bias", (rows,), heads)
            elif config["attention_bias" if module.startswith("self_attn.") else "mlp_bias"]:
                # llama.cpp takes each bias by itself; Hugging Face has all of a block's or none.
                spec = TensorSpec(f"{name}.bias", np.dtype(np.float32), (rows,))
                sources[spec.name] = Source(spec, None)
    add("model.norm.weight", (e,))
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", (v, e))

    if biased and len(zeros := sorted(s.spec.name for s in sources.values() if s.tensor is None)):
        notes.append(f"{len(zeros)} biases that the file does not have are written as zeros")
    if (freqs := header.tensors.get("rope_freqs.weight")) is not None and (
        freqs.shape != (d // 2,) or freqs.type != GGMLQuantizationType.F32
    ):
        faults.append(
            f"tensor rope_freqs.weight is {freqs.type.name}{list(freqs.shape)}, expected F32[{d // 2}]"
        )
    faults += [
        f"tensor {name} is not one of a Llama's"
        for name in header.tensors
        if name not in used and not name.endswith(_IGNORED)
    ]
    return sources


def _dtype(type_: GGMLQuantizationType) -> np.dtype[Any]:
    return PLAIN.get(type_, np.dtype(np.float32))


def _readable(type_: GGMLQuantizationType) -> bool:
    if type_ in PLAIN:
        return True
    try:  # the library's own table of what it can dequantise is private: ask it
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def read_values(tensor: GgufTensor) -> np.ndarray:
    """A tensor's values, as stored for F32, F16 and BF16, otherwise dequantised to float32.

    Peak memory is the result and a few megabytes: blocks are read and dequantised in groups of rows.
    """
    out = np.empty(tensor.shape, _dtype(tensor.type))
    rows = out.reshape(-1, tensor.shape[-1])
    row_bytes = tensor.nbytes // len(rows) if len(rows) else 0
    step = max(1, _CHUNK // max(1, tensor.shape[-1]))
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            data = np.fromfile(file, np.uint8, len(part) * row_bytes)
            if data.size != len(part) * row_bytes:
                raise ValueError(f"{tensor.path}: ends within tensor {tensor.name}")
            if tensor.type in PLAIN:
                part[...] = data.view(out.dtype).reshape(part.shape)
            else:
                with np.errstate(all="ignore"):  # damaged scales give NaN, which the cast reports
                    part[...] = dequantize(data.reshape(len(part), row_bytes), tensor.type)
    return out
