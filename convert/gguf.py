"""Reading a GGUF Llama: its config in Hugging Face's words, its tensors in Hugging Face's row order.

The facts come from llama.cpp: the metadata keys, their defaults and the tensor names of its "llama"
architecture, and what `convert_hf_to_gguf.py` does to a Llama on the way in, undone here:

- the rows of the query and key projections are interleaved, because its rotary embedding turns
  neighbouring pairs where Hugging Face's turns halves: each head's rows (2, D/2) became (D/2, 2);
- Llama 3's rope scaling is worked out into a tensor, `rope_freqs.weight` (see `convert.gguf_rope`);
- a tied output projection is left out;
- float32 metadata stands for decimals: 9.99999974738e-06 was 1e-05.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize

from convert.checkpoint import DTYPES, Checkpoint
from convert.gguf_header import GgufHeader, GgufTensor, read_header
from convert.gguf_rope import metadata_scaling, tensor_scaling
from convert.gguf_tokenizer import generation_config, tokenizer_files
from llama_jax.safetensors_io import TensorSpec

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_CHUNK = 2**22  # values dequantised at a time: bounds the library's temporaries

# Hyperparameters that llama.cpp's graph would obey and Hugging Face's Llama has no field for, with the
# values under which they do nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.causal": (True,),
}
_IGNORED = ("rope_freqs.weight", "attn_rot_embd.weight")  # the first is read as configuration


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The Llama in a GGUF file (or its pieces); no tensor data is read until `load` is called.

    Without `tokenizer`, the vocabulary stays behind and faults in it do not matter.
    Raises ValueError, with every fault found, for a damaged file, another architecture, missing,
    unknown or misshapen tensors, types the gguf library cannot dequantise, and hyperparameters that
    Hugging Face's Llama does not have.
    """
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: general.architecture is {architecture!r}, expected 'llama'")
    keys = Keys(header.metadata, f"{architecture}.")
    notes: list[str] = []
    config = _config(header, keys, notes)
    _raise(path, keys.faults)

    sources = _map_tensors(header, config, keys.faults, notes)
    _raise(path, keys.faults)
    config |= _rope(header, config, keys)
    _raise(path, keys.faults)
    generation = json.dumps(generation_config(header.metadata, config), indent=2) + "\n"
    files = {"generation_config.json": generation}
    tokenizer_facts: dict[str, Any] = {}
    if tokenizer:
        texts, tokenizer_facts, more = tokenizer_files(path, header.metadata, config)
        files |= texts
        notes += more

    return Checkpoint(
        format=f"GGUF v{header.version}",
        config=config,
        tensors=tuple(source.spec for source in sources.values()),
        load=lambda name: sources[name].read(),
        dtype=_default_dtype(header),
        files=files,
        facts=_facts(header) | tokenizer_facts,
        notes=tuple(notes),
    )


@dataclass
class Keys:
    """Metadata below a prefix, by type; what is wrong is collected in `faults`, not raised."""

    metadata: dict[str, Any]
    prefix: str
    faults: list[str] = field(default_factory=list)

    def integer(self, key: str, default: int | None = None, *, below: int = 2**31) -> int:
        """A positive integer below `below`. Per-layer arrays must repeat one value."""
        value = self.metadata.get(self.prefix + key)
        if isinstance(value, list) and value:
            if any(v != value[0] for v in value):
                self.faults.append(
                    f"{self.prefix}{key} differs between layers ({sorted(set(value))}), "
                    "expected one value: Hugging Face's Llama has the same shape in every layer"
                )
            value = value[0]
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < below:
            self.faults.append(f"{self.prefix}{key} is {value!r}, expected a positive integer")
            return 1
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. A float32 stands for the shortest decimal that rounds to it."""
        value = self.metadata.get(self.prefix + key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float | np.float32) or not math.isfinite(value):
            self.faults.append(f"{self.prefix}{key} is {value!r}, expected a finite number")
            return 1.0
        return float(str(value)) if isinstance(value, np.float32) else float(value)

    def string(self, key: str, default: str) -> str:
        value = self.metadata.get(self.prefix + key, default)
        if not isinstance(value, str):
            self.faults.append(f"{self.prefix}{key} is {value!r}, expected a string")
            return default
        return value


def _config(header: GgufHeader, keys: Keys, notes: list[str]) -> dict[str, Any]:
    """Everything but rope: config.json from metadata and from which tensors there are."""
    layers = keys.integer("block_count", below=max(2, len(header.tensors)))
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    query = header.tensors.get("blk.0.attn_q.weight")
    derived = (query.shape[0] if query else hidden) // heads
    head_dim = keys.integer("attention.key_length", derived or 1)
    for key, meaning in [
        ("attention.value_length", "heads whose values are as wide as their keys"),
        ("rope.dimension_count", "rotary embedding over the whole head, not a part of it"),
    ]:
        if (found := keys.integer(key, head_dim)) != head_dim:
            keys.faults.append(f"llama.{key} is {found}, expected {head_dim}: {meaning}")
    if heads % kv_heads:
        keys.faults.append(f"llama.attention.head_count is {heads}, expected a multiple of {kv_heads}")
    if head_dim % 2:
        keys.faults.append(f"the head dimension is {head_dim}, expected an even number")
    for key, values in _NEUTRAL.items():
        found_value = header.metadata.get(f"llama.{key}", values[0])
        if found_value not in values:
            keys.faults.append(
                f"llama.{key} is {found_value!r}, expected {values[-1]}: "
                "Hugging Face's Llama has no such thing"
            )
    scale = keys.number("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        keys.faults.append(f"llama.attention.scale is {scale}, expected 1/sqrt({head_dim})")
    if window := header.metadata.get("llama.attention.sliding_window"):
        notes.append(f"llama.attention.sliding_window {window} is not carried over: Llama has none")

    eps = keys.number("attention.layer_norm_rms_epsilon")
    if not eps > 0.0:
        keys.faults.append(f"llama.attention.layer_norm_rms_epsilon is {eps}, expected above 0")
    vocabulary = _vocabulary(header, keys)
    biases = {name.split(".")[2] for name in header.tensors if name.endswith(".bias") and name.count(".") == 3}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "initializer_range": 0.02,
        "rms_norm_eps": eps,
        "use_cache": True,
        "pretraining_tp": 1,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": any(name.startswith("attn_") for name in biases),
        "attention_dropout": 0.0,
        "mlp_bias": any(name.startswith("ffn_") for name in biases),
        **_special_ids(header, vocabulary, notes),
    }


def _vocabulary(header: GgufHeader, keys: Keys) -> int:
    """Rows of the embedding; the tokens, or without them the stated size, must agree."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    stated = len(tokens) if isinstance(tokens, list) else header.metadata.get("llama.vocab_size")
    embedding = header.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else stated
    if not isinstance(rows, int) or rows < 1:
        keys.faults.append(f"the vocabulary size is {rows!r}, expected a positive integer")
        return 1
    if stated is not None and stated != rows:
        keys.faults.append(f"token_embd.weight has {rows} rows, expected {stated}, one per token")
    return rows


def _special_ids(header: GgufHeader, vocabulary: int, notes: list[str]) -> dict[str, int | None]:
    """bos, eos and pad; llama.cpp's SentencePiece vocabularies have 1 and 2 where nothing is said."""
    sentencepiece = header.metadata.get("tokenizer.ggml.model") == "llama"
    ids: dict[str, int | None] = {}
    for name, key, default in [("bos", "bos", 1), ("eos", "eos", 2), ("pad", "padding", None)]:
        value = header.metadata.get(f"tokenizer.ggml.{key}_token_id", default if sentencepiece else None)
        if value is not None and not (isinstance(value, int) and 0 <= value < vocabulary):
            notes.append(f"tokenizer.ggml.{key}_token_id {value!r} is outside the vocabulary: ignored")
            value = None
        ids[f"{name}_token_id"] = value
    return ids


def _rope(header: GgufHeader, config: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """The rope fields in both of Hugging Face's layouts: `rope_parameters` is transformers 5's,
    `rope_theta` with `rope_scaling` is 4's, and each major reads only its own."""
    theta = keys.number("rope.freq_base", 10000.0)
    if not theta > 0.0:
        keys.faults.append(f"llama.rope.freq_base is {theta}, expected above 0")
        return {}
    context = config["max_position_embeddings"]
    parameters = metadata_scaling(keys, context)
    tensor = header.tensors.get("rope_freqs.weight")
    if tensor is not None and tensor.type == GGMLQuantizationType.F32:
        factors = _read_values(tensor)
        if not (np.isfinite(factors) & (factors > 0)).all():
            keys.faults.append("rope_freqs.weight has values that are not positive and finite")
            return {}
        found = tensor_scaling(
            factors, head_dim=config["head_dim"], theta=theta, context_length=context
        )
        if "default" not in (found["rope_type"], parameters["rope_type"]):
            keys.faults.append(
                f"rope.scaling.type {parameters['rope_type']} and rope_freqs.weight are both given, "
                "expected one: Hugging Face has no combination of them"
            )
        parameters = found if found["rope_type"] != "default" else parameters
    return {
        "rope_parameters": {**parameters, "rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": None if parameters["rope_type"] == "default" else parameters,
    }


# --- tensors -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One Hugging Face tensor and where its values come from; no tensor means zeros."""

    spec: TensorSpec
    tensor: GgufTensor | None
    heads: int = 0
    """Over how many heads the rows are interleaved; 0 where they are not."""

    def read(self) -> np.ndarray:
        if self.tensor is None:
            return np.zeros(self.spec.shape, self.spec.dtype)
        values = _read_values(self.tensor)
        return _split_halves(values, self.heads) if self.heads else values


def _split_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo the interleaving of rotary pairs: [heads * D, ...], per head (D/2, 2) -> (2, D/2)."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _map_tensors(
    header: GgufHeader, config: dict[str, Any], faults: list[str], notes: list[str]
) -> dict[str, _Source]:
    """Hugging Face name -> source, in the model's order; what does not fit goes to `faults`."""
    sources: dict[str, _Source] = {}
    used: set[str] = set()

    def add(name: str, gguf_name: str, shape: tuple[int, ...], heads: int = 0) -> None:
        tensor = header.tensors.get(gguf_name)
        used.add(gguf_name)
        if tensor is None:
            faults.append(f"tensor {gguf_name} is missing, expected {list(shape)}")
        elif tensor.shape != shape:
            faults.append(f"tensor {gguf_name} is {list(tensor.shape)}, expected {list(shape)}")
        elif not _readable(tensor.type):
            faults.append(f"tensor {gguf_name} has type {tensor.type.name}, which cannot be dequantised")
        else:
            sources[name] = _Source(TensorSpec(name, _dtype(tensor.type), shape), tensor, heads)

    e, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h, k, d = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    projections = {
        "attn_q": ("self_attn.q_proj", h * d, e, h),
        "attn_k": ("self_attn.k_proj", k * d, e, k),
        "attn_v": ("self_attn.v_proj", k * d, e, 0),
        "attn_output": ("self_attn.o_proj", e, h * d, 0),
        "ffn_gate": ("mlp.gate_proj", f, e, 0),
        "ffn_up": ("mlp.up_proj", f, e, 0),
        "ffn_down": ("mlp.down_proj", e, f, 0),
    }
    layers = range(config["num_hidden_layers"])
    biased = {p for p in projections if any(f"blk.{i}.{p}.bias" in header.tensors for i in layers)}
    add("model.embed_tokens.weight", "token_embd.weight", (v, e))
    for i in layers:
        add(f"model.layers.{i}.input_layernorm.weight", f"blk.{i}.attn_norm.weight", (e,))
        add(f"model.layers.{i}.post_attention_layernorm.weight", f"blk.{i}.ffn_norm.weight", (e,))
        for p, (module, rows, columns, heads) in projections.items():
            name = f"model.layers.{i}.{module}"
            add(f"{name}.weight", f"blk.{i}.{p}.weight", (rows, columns), heads)
            if p in biased:
                add(f"{name}.bias", f"blk.{i}.{p}.bias", (rows,), heads)
            elif config["attention_bias" if p.startswith("attn_") else "mlp_bias"]:
                # llama.cpp takes each bias by itself; Hugging Face has all of a block's or none.
                spec = TensorSpec(f"{name}.bias", np.dtype(np.float32), (rows,))
                sources[spec.name] = _Source(spec, None)
    add("model.norm.weight", "output_norm.weight", (e,))
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", "output.weight", (v, e))

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
    return _PLAIN.get(type_, np.dtype(np.float32))


def _readable(type_: GGMLQuantizationType) -> bool:
    if type_ in _PLAIN:
        return True
    try:  # the library's own table of what it can dequantise is private: ask it
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def _read_values(tensor: GgufTensor) -> np.ndarray:
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
            if tensor.type in _PLAIN:
                part[...] = data.view(out.dtype).reshape(part.shape)
            else:
                with np.errstate(all="ignore"):  # damaged scales give NaN, which the cast reports
                    part[...] = dequantize(data.reshape(len(part), row_bytes), tensor.type)
    return out


def _default_dtype(header: GgufHeader) -> str:
    """The matrices' dtype where they share one and it is not quantised, else float32.

    Vectors do not count: converters store norms as F32 whatever the model was trained in.
    """
    types = {t.type for t in header.tensors.values() if len(t.shape) > 1}
    dtype = _PLAIN.get(types.pop(), np.dtype(np.float32)) if len(types) == 1 else np.dtype(np.float32)
    return next(name for name, known in DTYPES.items() if known == dtype)


def _facts(header: GgufHeader) -> dict[str, Any]:
    """What `info` shows beside the config."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for tensor in header.tensors.values():
        count[tensor.type.name] += 1
        size[tensor.type.name] += tensor.nbytes
    facts: dict[str, Any] = {
        "stored": {name: {"tensors": count[name], "bytes": size[name]} for name in count},
        "file_bytes": header.file_size,
    }
    for key in ("name", "organization", "license", "size_label"):
        if isinstance(value := header.metadata.get(f"general.{key}"), str):
            facts[key] = value
    file_type = header.metadata.get("general.file_type")
    if file_type in list(LlamaFileType):
        facts["file_type"] = LlamaFileType(file_type).name
    return facts


def _raise(path: Path, faults: list[str]) -> None:
    if faults:
        shown = "; ".join(faults[:20])
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{path}: {shown}{more}")
