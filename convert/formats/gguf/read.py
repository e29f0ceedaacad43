"""Reading a GGUF Llama: its config in Hugging Face's words, its tensors in Hugging Face's row order.

The facts come from llama.cpp: the metadata keys, their defaults and the tensor names of its "llama"
architecture, and what `convert_hf_to_gguf.py` does to a Llama on the way in, undone here:

- the rows of the query and key projections are interleaved, because its rotary embedding turns
  neighbouring pairs where Hugging Face's turns halves: each head's rows (2, D/2) became (D/2, 2);
- Llama 3's rope scaling is worked out into a tensor, `rope_freqs.weight` (see `convert.formats.gguf.rope`);
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

import numpy as np
from gguf.constants import LlamaFileType

from convert.checkpoint import DTYPES, Checkpoint
from convert.formats.gguf.header import GgufHeader, read_header
from convert.formats.gguf.rope import metadata_scaling, tensor_scaling
from convert.formats.gguf.tensors import PLAIN, map_tensors, read_values
from convert.formats.gguf.tokenizer_read import generation_config, tokenizer_files
from convert.formats.gguf.write import losses, rule, specs, stored_bytes, write
from convert.model_card import FILE as CARD
from convert.model_card import card_of
from llama_jax.config import LlamaConfig

__all__ = [
    "DTYPE_NAMES",
    "TITLE",
    "losses",
    "read",
    "recognises",
    "rule",
    "specs",
    "stored_bytes",
    "write",
]

TITLE = "GGUF"
DTYPE_NAMES = ("float32", "bfloat16", "float16", "q8_0")


def recognises(path: Path) -> bool:
    """Whether it looks like one: a file of that name, or that begins so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


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

    sources = map_tensors(header, config, keys.faults, notes)
    _raise(path, keys.faults)
    config["rope_parameters"] = _rope(header, config, keys)
    _raise(path, keys.faults)
    try:
        config = LlamaConfig.from_dict(config).to_dict()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    generation = json.dumps(generation_config(header.metadata, config), indent=2) + "\n"
    files = {"generation_config.json": generation}
    tokenizer_facts: dict[str, Any] = {}
    if tokenizer:
        texts, tokenizer_facts, more = tokenizer_files(path, header.metadata, config)
        files |= texts
        notes += more

    facts = _facts(header)
    card = card_of(facts)
    return Checkpoint(
        format=f"GGUF v{header.version}",
        config=config,
        tensors=tuple(source.spec for source in sources.values()),
        load=lambda name: sources[name].read(),
        dtype=_default_dtype(header),
        files={name: text.encode() for name, text in files.items()}
        | ({} if card is None else {CARD: card}),
        facts=facts | tokenizer_facts,
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
        """A string."""
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
        keys.faults.append(
            f"llama.attention.head_count is {heads}, expected a multiple of {kv_heads}"
        )
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
    biases = {
        name.split(".")[2]
        for name in header.tensors
        if name.endswith(".bias") and name.count(".") == 3
    }
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
        value = header.metadata.get(
            f"tokenizer.ggml.{key}_token_id", default if sentencepiece else None
        )
        if value is not None and not (type(value) is int and 0 <= value < vocabulary):
            notes.append(
                f"tokenizer.ggml.{key}_token_id {value!r} is outside the vocabulary: ignored"
            )
            value = None
        ids[f"{name}_token_id"] = value
    return ids


def _rope(header: GgufHeader, config: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """Hugging Face's `rope_parameters`, from the metadata and `rope_freqs.weight`."""
    theta = keys.number("rope.freq_base", 10000.0)
    if not theta > 0.0:
        keys.faults.append(f"llama.rope.freq_base is {theta}, expected above 0")
        return {}
    context = config["max_position_embeddings"]
    parameters = metadata_scaling(keys, context)
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    tensor = header.tensors.get("rope_freqs.weight")
    if tensor is None and attention != 1.0 and parameters["rope_type"] != "yarn":
        keys.faults.append(
            f"llama.rope.scaling.attn_factor is {attention}, expected 1 without yarn or rope_freqs.weight"
        )
    if tensor is not None:
        factors = read_values(tensor)
        if not (np.isfinite(factors) & (factors > 0)).all():
            keys.faults.append("rope_freqs.weight has values that are not positive and finite")
            return {}
        found = tensor_scaling(
            factors,
            head_dim=config["head_dim"],
            theta=theta,
            context_length=context,
            attention=attention,
        )
        if "default" not in (found["rope_type"], parameters["rope_type"]):
            keys.faults.append(
                f"rope.scaling.type {parameters['rope_type']} and rope_freqs.weight are both given, "
                "expected one: Hugging Face has no combination of them"
            )
        parameters = found if found["rope_type"] != "default" else parameters
    return {**parameters, "rope_theta": theta}


def _default_dtype(header: GgufHeader) -> str:
    """The matrices' dtype where they share one and it is not quantised, else float32.

    Vectors do not count: converters store norms as F32 whatever the model was trained in.
    """
    types = {t.type for t in header.tensors.values() if len(t.shape) > 1}
    dtype = (
        PLAIN.get(types.pop(), np.dtype(np.float32)) if len(types) == 1 else np.dtype(np.float32)
    )
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
    for key in ("name", "organization", "license", "license.name", "license.link", "size_label"):
        if isinstance(value := header.metadata.get(f"general.{key}"), str) and value:
            facts[key.replace(".", "_")] = value
    languages = header.metadata.get("general.languages")
    if isinstance(languages, list) and languages and all(type(each) is str for each in languages):
        facts["languages"] = languages
    file_type = header.metadata.get("general.file_type")
    if file_type in list(LlamaFileType):
        facts["file_type"] = LlamaFileType(file_type).name
    return facts


def _raise(path: Path, faults: list[str]) -> None:
    if faults:
        shown = "; ".join(faults[:20])
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{path}: {shown}{more}")
