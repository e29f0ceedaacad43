"""Read Flax checkpoints: names, and kernels of [in, out], as Hugging Face has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.companions import read_companions, require_inside
from convert.formats.directory import checkpoint_of, spec_of
from convert.formats.flax.leaves import Leaf, find_leaves
from convert.formats.llama_tensors import (
    renamed,
    rotary_heads,
    tensor_shapes,
    to_halves,
)
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.checkpoints.weight_files import read_index
from llama_jax.config import LlamaConfig
from llama_jax.formatting import summarize

_EMBEDDING = "model.embed_tokens.weight"
SINGLE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
_EASYLM = re.compile(r"streaming_(params|train_state)(_\w+)?")
# EasyLM's names, as `renamed` takes them; kernels are [in, out] in both
_EASYLM_MODULES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
_STATE = ("opt_state/", "step", "tx/", "dropout_rng")  # of a train state, no weights


@dataclass(frozen=True)
class _Layout:
    """Where a tensor is, given its name in Hugging Face's layout; and the order of rotated rows."""

    title: str
    path_of: Callable[[str], str]
    pairs: bool


def recognizes(path: Path) -> bool:
    """Whether it looks like one: flax_model.msgpack, an EasyLM stream, or the directory of either."""
    if path.is_dir():
        return any((path / name).exists() for name in (SINGLE, INDEX)) or bool(_streams(path))
    return path.suffix == ".msgpack" or _EASYLM.fullmatch(path.name) is not None


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The Llama in a Flax checkpoint; no array is read until `load` is called.

    The config.json is the one beside the weights: the files themselves do not tell the number of heads.

    Raises:
        ValueError: with every problem: missing, unexpected or misshapen arrays, damaged files; no
            config.json.
    """
    directory = path if path.is_dir() else path.parent
    require_inside(directory, "config.json")
    if not (directory / "config.json").exists():
        raise ValueError(
            f"{directory / 'config.json'}: not found; Flax's files do not tell the number of heads, so put "
            "the model's Hugging Face config.json there"
        )
    config = LlamaConfig.from_pretrained(directory)
    files = _files(path)
    leaves = _weights({name: leaf for file in files for name, leaf in find_leaves(file).items()})
    layout = _layout(leaves)
    found, notes = _match(path, config, leaves, layout)

    def load(name: str) -> np.ndarray:
        values = found[name].read()
        if _is_kernel(name, values.shape):
            values = values.T
        heads = rotary_heads(name, config) if layout.pairs else 0
        return np.ascontiguousarray(to_halves(values, heads))

    tensors = [
        TensorSpec(name, spec_of(name, found[name].stored).dtype, shape)
        for name, shape in tensor_shapes(config).items()
    ]
    return checkpoint_of(
        directory,
        title=layout.title,
        config=config,
        tensors=tensors,
        load=load,
        stored=[leaf.stored for leaf in found.values()],
        weight_files=files,
        files=read_companions(directory, tokenizer=tokenizer),
        notes=notes,
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / SINGLE).exists():
        require_inside(path, SINGLE)
        return [path / SINGLE]
    if (path / INDEX).exists():
        require_inside(path, INDEX)
        names = sorted(set(read_index(path / INDEX).values()))
        for name in names:
            require_inside(path, name)
            if not (path / name).exists():
                raise ValueError(f"{path / name}: not found, though {INDEX} names it")
        return [path / name for name in names]
    streams = _streams(path)
    if len(streams) > 1:
        found = ", ".join(file.name for file in streams)
        raise ValueError(f"{path}: found {found}, expected one; give the file itself")
    require_inside(path, streams[0].name)
    return streams


def _streams(directory: Path) -> list[Path]:
    return sorted(file for file in directory.iterdir() if _EASYLM.fullmatch(file.name))


def _weights(leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    """Without optimizer state, and without the "params" that some trees begin with."""
    kept = {name: leaf for name, leaf in leaves.items() if not name.startswith(_STATE)}
    while kept and all(name.startswith("params/") for name in kept):
        kept = {name.removeprefix("params/"): leaf for name, leaf in kept.items()}
    return kept


def _layout(leaves: dict[str, Leaf]) -> _Layout:
    if any(name.startswith("transformer/") for name in leaves):
        return _Layout("EasyLM", _easylm_path, pairs=True)
    return _Layout("Flax", _flax_path, pairs=False)


def _flax_path(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if kind == "weight" and not module.endswith("norm"):
        kind = "embedding" if module.endswith("embed_tokens") else "kernel"
    return f"{module.replace('.', '/')}/{kind}"


def _easylm_path(name: str) -> str:
    module, _, kind = renamed(name, _EASYLM_MODULES, "transformer.h").rpartition(".")
    if kind == "weight":
        kind = "embedding" if module == _EASYLM_MODULES["model.embed_tokens"] else "kernel"
    return f"{module.replace('.', '/')}/{kind}"


def _is_kernel(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Flax has the transpose of Hugging Face's tensor."""
    return len(shape) == 2 and name != _EMBEDDING


def _match(
    path: Path, config: LlamaConfig, leaves: dict[str, Leaf], layout: _Layout
) -> tuple[dict[str, Leaf], list[str]]:
    """The array of every tensor of the model, and notes."""
    if config.num_hidden_layers > len(leaves):
        raise ValueError(
            f"{path}: found {len(leaves)} arrays, expected some for each of "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    left, found, problems = dict(leaves), {}, []
    for name, shape in tensor_shapes(config).items():
        place = layout.path_of(name)
        leaf = left.pop(place, None)
        if leaf is None:
            problems.append(f"{place}: missing")
            continue
        stored = leaf.stored
        expected = shape[::-1] if _is_kernel(name, shape) else shape
        if stored.dtype not in FLOAT_DTYPES:
            problems.append(f"{place}: found {stored.dtype}, expected a floating-point dtype")
        elif stored.shape != expected:
            problems.append(f"{place}: found shape {list(stored.shape)}, expected {list(expected)}")
        found[name] = leaf
    notes = []
    head = left.pop(layout.path_of("lm_head.weight"), None)
    if head is not None and not problems:
        embedding = found[_EMBEDDING]
        if head.stored.shape != embedding.stored.shape[::-1] or not np.array_equal(
            head.read().T, embedding.read()
        ):
            problems.append(
                "lm_head/kernel: differs from the embedding, but tie_word_embeddings is true"
            )
        notes.append("lm_head, a copy of the embedding, is left out: the head is tied")
    problems += [f"{name}: unexpected" for name in left if "rotary" not in name]
    if problems:
        raise ValueError(summarize(str(path), problems))
    return found, notes
