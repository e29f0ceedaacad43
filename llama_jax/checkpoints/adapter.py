"""LoRA adapters of PEFT: what each does to the tensors of its base model.

The formulas are those of PEFT's `merge_and_unload`: LoRA (arXiv:2106.09685), rank-stabilized LoRA
(arXiv:2312.03732) and DoRA (arXiv:2402.09353).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.names import LM_HEAD
from llama_jax.checkpoints.safetensors_read import (
    FLOAT_DTYPES,
    StoredTensor,
    read_header,
    read_tensor,
)
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import ADAPTER_CONFIG
from llama_jax.files.json_object import read_json_object
from llama_jax.formatting import summarize

WEIGHTS = "adapter_model.safetensors"
EMBEDDING = "model.embed_tokens.weight"

_WRAPPER = "base_model.model."
_BARE_DECODER = ("layers.", "embed_tokens.", "norm.")
# module, what of LoRA it is, and the name of the adapter, which some programs leave in
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(A|B)\.(default\.)?(?P<kind>weight|bias)|lora_embedding_(?P<e>A|B)"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)(\.default)?(\.weight)?"
)
_SAVED = re.compile(
    r"(?P<module>.+?)(\.base_layer|\.modules_to_save(\.default)?)?\.(?P<kind>weight|bias)"
)
# initial values that were also subtracted from the base model's weights
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED = ("alora_invocation_tokens", "layer_replication", "use_qalora", "target_parameters")
_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class Update:
    """What an adapter does to one tensor, in this order.

    replacement: stands in place of the base model's tensor.
    indices, rows: these of its rows are replaced.
    bias: `scale * bias` is added.
    a [rank, in], b [out, rank]: `scale * b @ a` is added; to an embedding, its transpose.
    magnitude: DoRA's, the new norm of each output feature.
    """

    replacement: StoredTensor | None = None
    indices: tuple[int, ...] = ()
    rows: StoredTensor | None = None
    a: StoredTensor | None = None
    b: StoredTensor | None = None
    bias: StoredTensor | None = None
    magnitude: StoredTensor | None = None
    scale: float = 1.0
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter, of which only headers have been read.

    updates: by the base model's names. tied: whether the head follows the embedding in what is trained.
    """

    directory: Path
    updates: Mapping[str, Update]
    tied: bool
    notes: tuple[str, ...] = field(default=())


def open_adapter(directory: Path) -> Adapter:
    """Read the headers of a PEFT directory.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: no such files, damaged ones, an adapter of another kind than LoRA, or one that cannot be
            merged into the base model.
    """
    config_file = directory / ADAPTER_CONFIG
    if not config_file.is_file():
        raise ValueError(f"{directory}: found no {ADAPTER_CONFIG}, expected a PEFT adapter")
    config = read_json_object(config_file)
    _require_mergeable(config, config_file)
    if not (directory / WEIGHTS).is_file():
        reason = "not found"
        if (directory / "adapter_model.bin").exists():
            reason += "; load the adapter with peft and save it again, which writes safetensors"
        raise ValueError(f"{directory / WEIGHTS}: {reason}")
    try:
        stored = read_header(directory / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    try:
        updates = _updates(stored, config)
    except ValueError as error:
        raise ValueError(f"{directory / WEIGHTS}: {error}") from None
    saved = set(config.get("modules_to_save") or ())
    separate = {"embed_tokens", "lm_head"} & saved and not config.get("ensure_weight_tying")
    lora = any(updates.get(name, Update()).a is not None for name in (EMBEDDING, LM_HEAD))
    return Adapter(directory, updates, tied=not (separate or lora))


def _require_mergeable(config: Mapping[str, Any], file: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type: found {kind!r}, expected 'LORA'")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{file}: init_lora_weights: found {initial!r}, which changes the base model too; save the "
            "adapter with peft's path_initial_model_for_weight_conversion"
        )
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(f"{file}: {name}: cannot be merged into the base model, expected null")
    if type(config.get("r")) is not int or config["r"] < 1:
        raise ValueError(f"{file}: r: found {config.get('r')!r}, expected a positive integer")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{file}: {name}: expected an object")
    if not isinstance(saved := config.get("modules_to_save") or [], list):
        raise ValueError(f"{file}: modules_to_save: found {saved!r}, expected a list or null")


def _updates(stored: list[StoredTensor], config: Mapping[str, Any]) -> dict[str, Update]:
    updates: dict[str, Update] = {}
    problems = []

    def add(name: str, **fields: Any) -> None:
        updates[name] = replace(updates.get(name, Update()), **fields)

    for tensor in stored:
        name = tensor.name.removeprefix(_WRAPPER)
        if name.startswith(_BARE_DECODER):
            name = f"model.{name}"
        if tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name}: found dtype {tensor.dtype}, expected floating point")
        elif match := _PART.fullmatch(name):
            module, part = match["module"], match["part"]
            weight = f"{module}.weight"
            if part.startswith("token_adapter"):
                add(weight, rows=tensor, indices=_token_indices(config, module))
            elif part == "lora_magnitude_vector":
                add(weight, magnitude=tensor)
            elif match["kind"] == "bias":
                add(f"{module}.bias", bias=tensor, scale=_scale(config, module))
            else:
                which = (match["e"] or part[5]).lower()
                embedding = match["e"] is not None
                add(weight, **{which: tensor}, scale=_scale(config, module), embedding=embedding)
        elif match := _SAVED.fullmatch(name):
            add(f"{match['module']}.{match['kind']}", replacement=tensor)
        else:
            problems.append(f"{name}: unexpected")
    for name, update in updates.items():
        problems += _problems(name, update, config)
    if not updates and not problems:
        problems.append("found no tensors")
    if problems:
        raise ValueError(summarize(f"{len(problems)} problems", problems))
    return updates


def _problems(name: str, update: Update, config: Mapping[str, Any]) -> Iterator[str]:
    a, b = update.a, update.b
    if (a is None) != (b is None):
        yield f"{name}: found lora_{'A' if b is None else 'B'} without lora_{'B' if b is None else 'A'}"
    elif a is not None and b is not None:
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            yield f"{name}: found lora_A {list(a.shape)} and lora_B {list(b.shape)}, expected one rank"
        elif a.shape[0] != (rank := _of_pattern(config, "rank_pattern", name, config["r"])):
            yield f"{name}: found rank {a.shape[0]}, expected {rank}, as {ADAPTER_CONFIG} says"
    elif update.magnitude is not None:
        yield f"{name}: found lora_magnitude_vector without lora_A"
    if update.rows is not None and update.rows.shape[:1] != (len(update.indices),):
        yield (
            f"{name}: found trained rows {list(update.rows.shape)}, expected {len(update.indices)}, as "
            f"{ADAPTER_CONFIG} says"
        )


def _scale(config: Mapping[str, Any], module: str) -> float:
    rank = _of_pattern(config, "rank_pattern", module, config["r"])
    alpha = _of_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"{module}: found rank {rank!r} and alpha {alpha!r}, expected numbers")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_pattern(config: Mapping[str, Any], field_name: str, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    module = name.removesuffix(".weight")
    for pattern, value in (config.get(field_name) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise ValueError(f"{field_name}: {pattern!r} is not a regular expression") from None
    return default


def _token_indices(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        matching = [value for key, value in indices.items() if f".{module}".endswith(f".{key}")]
        indices = matching[0] if matching else None
    if not isinstance(indices, list) or not all(
        type(index) is int and index >= 0 for index in indices
    ):
        raise ValueError(
            f"{module}: found trained rows, expected their numbers in {ADAPTER_CONFIG}"
        )
    return tuple(indices)


def adapted_config(adapter: Adapter, config: LlamaConfig) -> LlamaConfig:
    """The configuration of the merged model: a resized vocabulary, added biases, a head of its own."""
    updates = adapter.updates
    changes: dict[str, Any] = {}
    embedding = updates.get(EMBEDDING, Update()).replacement
    if embedding is not None and embedding.shape:
        changes["vocab_size"] = embedding.shape[0]
    biases = [name for name in updates if name.endswith(".bias")]
    if any(".self_attn." in name for name in biases):
        changes["attention_bias"] = True
    if any(".mlp." in name for name in biases):
        changes["mlp_bias"] = True
    if config.tie_word_embeddings and not adapter.tied:
        changes["tie_word_embeddings"] = False
    return replace(config, **changes)


def source_of(name: str, adapter: Adapter, base: LlamaConfig) -> str | None:
    """The base model's tensor that the merged model's `name` comes from; None for a bias that it lacks."""
    if name == LM_HEAD and base.tie_word_embeddings:
        return EMBEDDING
    if name.endswith(".bias"):
        has = base.attention_bias if ".self_attn." in name else base.mlp_bias
        return name if has else None
    return name


def compare_with_base(
    adapter: Adapter, base: Mapping[str, tuple[int, ...]], merged: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What does not fit: the adapter is for another base model.

    Args:
        base, merged: shapes of the tensors of both models.
    """
    problems = []
    for name, update in adapter.updates.items():
        shape = merged.get(name)
        if shape is None:
            if name == LM_HEAD and update.replacement is not None:
                continue  # the embedding's, of a tied model
            problems.append(f"{name}: the base model has no such tensor")
            continue
        if update.replacement is not None and update.replacement.shape != shape:
            problems.append(
                f"{name}: found {list(update.replacement.shape)}, expected {list(shape)}"
            )
        if update.a is not None and update.b is not None:
            found = update.b.shape[0], update.a.shape[1]
            found = found[::-1] if update.embedding else found
            if found != shape:
                problems.append(f"{name}: found LoRA of {list(found)}, expected {list(shape)}")
        if update.magnitude is not None:
            features = shape[-1 if update.embedding else 0]
            if math.prod(update.magnitude.shape) != features:
                problems.append(
                    f"{name}: found {math.prod(update.magnitude.shape)} magnitudes, expected {features}"
                )
        if update.rows is not None and (
            update.rows.shape[1:] != shape[1:] or max(update.indices, default=0) >= shape[0]
        ):
            problems.append(f"{name}: trained rows do not fit {list(shape)}")
        if update.bias is not None and update.bias.shape != shape:
            problems.append(f"{name}: found {list(update.bias.shape)}, expected {list(shape)}")
    for name, shape in merged.items():
        if name in (EMBEDDING, LM_HEAD) and shape != base.get(name, base[EMBEDDING]):
            update = adapter.updates.get(name, Update())
            if update.replacement is None:
                problems.append(
                    f"{name}: the vocabulary was resized, but only of the other embedding"
                )
    return problems


def merge(update: Update, values: np.ndarray | None) -> np.ndarray:
    """A tensor of the merged model, in float32, or float64 if the base model's is.

    Args:
        values: the base model's tensor; None for a bias that it lacks.

    Raises:
        ValueError: a file that changed, or values that are not finite.
    """
    if update.replacement is not None:
        values = _read(update.replacement)
    if values is None:
        assert update.bias is not None
        values = np.zeros(update.bias.shape, np.float32)
    dtype = np.dtype(np.float64 if values.dtype == np.float64 else np.float32)
    out: np.ndarray[Any, np.dtype[Any]] = np.array(values, dtype)
    if update.rows is not None:
        out[list(update.indices)] = _read(update.rows).astype(dtype)
    if update.bias is not None:
        out += update.scale * _read(update.bias).astype(dtype)
    if update.a is not None and update.b is not None:
        a, b = (_read(each).astype(dtype) for each in (update.a, update.b))
        left, right = (a.T, b.T) if update.embedding else (b, a)
        step = max(1, _BLOCK_BYTES // max(1, out.shape[1] * out.itemsize))
        for begin in range(0, len(out), step):
            out[begin : begin + step] += update.scale * (left[begin : begin + step] @ right)
        if update.magnitude is not None:
            axis = 0 if update.embedding else 1
            norm = np.sqrt(np.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", out, out))
            out *= np.expand_dims(_read(update.magnitude).astype(dtype).reshape(-1) / norm, axis)
    return out


def _read(tensor: StoredTensor) -> np.ndarray:
    values = np.empty(tensor.shape, FLOAT_DTYPES[tensor.dtype])
    try:
        finite = read_tensor(tensor, values)
    except ValueError as error:
        raise ValueError(f"{tensor.path.parent}: {error}") from None
    if not finite:
        raise ValueError(
            f"{tensor.path}: {tensor.name}: found NaN or infinity, expected finite values"
        )
    return values
