"""What readers of trainers' state dicts share: the model found in one, and its config.json beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.companions import read_companions, require_inside
from convert.formats.directory import checkpoint_of, model_tensors, rows_by_loading, spec_of
from convert.formats.llama_tensors import rotary_heads, to_halves
from convert.formats.meta.params import config_of
from convert.formats.state_dict_names import ModelNames, model_names
from convert.renaming import Rename, renamed
from llama_jax.checkpoints.match import same_values
from llama_jax.checkpoints.names import is_buffer
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor
from llama_jax.checkpoints.weight_files import StoredWeights
from llama_jax.config import LlamaConfig
from llama_jax.files.json_object import read_json_object

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model_of(
    path: Path,
    *,
    title: str,
    homes: Sequence[Path],
    stored: Mapping[str, StoredTensor],
    load: Callable[[str], np.ndarray],
    weight_files: Iterable[Path],
    tokenizer: bool,
    rename: Rename | None = None,
    notes: Iterable[str] = (),
) -> Checkpoint:
    """The Llama in a state dict.

    Args:
        path: of the weights, for errors.
        title: of the format, for people.
        homes: directories in which config.json, or Meta's params.json, may be, the likeliest first.
        stored: every tensor of it by its stored name, the optimizer's with them.
        load: reads one by its stored name.
        tokenizer: whether to read it.
        rename: what is done to the stored names first.

    Raises:
        ValueError: with every problem: no model in it, tensors that are missing, unexpected or misshapen,
            no config beside it.
    """
    try:
        places = renamed({name: name for name in stored}, rename)
        found = model_names(places)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors_by_name = {new: replace(stored[old], name=new) for new, old in places.items()}
    weights = _weights(found, tensors_by_name)

    def load_renamed(name: str) -> np.ndarray:
        return load(places[name])

    home, config, config_notes = _config(path, homes, weights, load_renamed)

    def load_stored(tensor: StoredTensor) -> np.ndarray:
        heads = rotary_heads(found.names[tensor.name], config) if found.pairs else 0
        return to_halves(load_renamed(tensor.name), heads)

    tensors, more = model_tensors(path, config, weights, rows_by_loading(load_stored))
    if found.prefix:
        more.append(f"{found.prefix} is removed from the tensors' names")
    return checkpoint_of(
        home,
        title=f"{title}, {'torchtitan' if found.pairs else 'Hugging Face'} names",
        config=config,
        tensors=[spec_of(name, tensor) for name, tensor in tensors.items()],
        load=lambda name: np.ascontiguousarray(load_stored(tensors[name])),
        stored=tensors.values(),
        weight_files=weight_files,
        files=read_companions(home, tokenizer=tokenizer),
        notes=[*notes, *config_notes, *more],
    )


def _weights(found: ModelNames, stored: Mapping[str, StoredTensor]) -> StoredWeights:
    """The model's tensors by Hugging Face's names."""
    weights = StoredWeights({}, [], set())
    for name, ours in found.names.items():
        tensor = stored[name]
        if is_buffer(ours):
            continue
        if tensor.dtype in FLOAT_DTYPES:
            weights.tensors[ours] = tensor
        else:
            weights.problems.append(
                f"{name}: found dtype {tensor.dtype}, expected {', '.join(FLOAT_DTYPES)}"
            )
            weights.unreadable.add(ours)
    return weights


def _config(
    path: Path, homes: Sequence[Path], weights: StoredWeights, load: Callable[[str], np.ndarray]
) -> tuple[Path, LlamaConfig, list[str]]:
    """The directory of the config, the config, and notes."""
    for home in homes:
        if (home / "config.json").exists():
            require_inside(home, "config.json")
            return home, LlamaConfig.from_pretrained(home), []
    for home in homes:
        if not (home / "params.json").exists():
            continue
        require_inside(home, "params.json")
        rows = weights.tensors[_EMBEDDING].shape[:1] if _EMBEDDING in weights.tensors else ()
        try:
            config, notes = config_of(
                read_json_object(home / "params.json"),
                vocab_size=max((*rows, 1)),
                tied=False,
                config_json=None,
            )
        except ValueError as error:
            raise ValueError(f"{home / 'params.json'}: {error}") from None
        return home, replace(config, tie_word_embeddings=_is_tied(weights, load)), notes
    raise ValueError(
        f"{homes[0] / 'config.json'}: not found; the weights in {path.name} do not tell the number of "
        "heads, RoPE or the norm's epsilon, so put the model's Hugging Face config.json, or Meta's "
        "params.json, there"
    )


def _is_tied(weights: StoredWeights, load: Callable[[str], np.ndarray]) -> bool:
    """Whether the head is the embedding: not stored, or with the same values."""
    head, embedding = weights.tensors.get(_HEAD), weights.tensors.get(_EMBEDDING)
    if head is None or embedding is None:
        return _HEAD not in weights.unreadable
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        return False
    return same_values(load(head.name), load(embedding.name))
