"""Hugging Face checkpoints in and out: the name table and safetensors directories.

The table is literal. Our parameters carry transformers' names and PyTorch's layout; the one difference
is that layers are stacked, so `model.layers.self_attn.q_proj.weight` [layers, out, in] is the stack of
`model.layers.{i}.self_attn.q_proj.weight` [out, in].
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from llama_jax.arguments import size
from llama_jax.config import LlamaConfig, read_json_object
from llama_jax.foreign_weights import ADAPTER_CONFIG, describe
from llama_jax.quantization import quantization_of, quantize, read_quantization
from llama_jax.safetensors_read import (
    CODE_DTYPES,
    FLOAT_DTYPES,
    StoredTensor,
    read_header,
    read_slice,
    read_tensor,
)
from llama_jax.safetensors_write import INDEX_FILE, SINGLE_FILE, TensorSpec, write_safetensors
from llama_jax.staging import staged_directory, write_text

Model = TypeVar("Model", bound=nnx.Module)
ParamPath = tuple[str, ...]

_LM_HEAD = "lm_head.weight"
OTHER_HEAD = (
    f"{_LM_HEAD}: differs from the embedding although tie_word_embeddings is true; remove the tensor, or "
    "set tie_word_embeddings to false in config.json to use it"
)
_COMPARED_BYTES = 1 << 24
# Heads that are trained for a task. A checkpoint without them, or with another's, is where that starts.
_TASK_HEADS = ("score.", "qa_outputs.")
# the decoder's tensors, under the prefixes that transformers' classes give them
_DECODER = re.compile(r"(?P<prefix>model\.|transformer\.|)(embed_tokens|layers|norm)\.")
# what wrappers put into the names of the modules they wrap: torch.compile, FSDP, activation checkpointing,
# DeepSpeed. No module of a model is called so.
_WRAPPERS = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# what others, and classes around the model, put before every name: DDP's `module.`, Lightning's `model.`,
# PEFT's `base_model.model.`
_OUTER = re.compile(rf"(?P<outer>(?:[A-Za-z_]\w*\.)*?){_DECODER.pattern}")
_LOW_RANK = re.compile(
    r"\.lora_([A-Z]|embedding_[A-Z]|magnitude_vector)|\.(base_layer|modules_to_save|original_module)\."
)
# what GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8 and MLX store in place of, or beside, a weight
_QUANTIZED_PARTS = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|weight_format|weight\.(absmax|quant_(map|state)\b.*)"
    r"|weight_(scale|scale_inv|scale_2|packed|shape|zero_point))$"
)
# what describes the model that an earlier save has left in a directory, and would describe the new one
_OF_EARLIER_SAVES = (
    "generation_config.json",
    "conversion.json",
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
    "adapter_model.bin",
)


@dataclass(frozen=True)
class Slot:
    """The place of one Hugging Face tensor: a parameter of ours and, in a stack, the layer."""

    path: ParamPath
    layer: int | None


def name_table(model: nnx.Module) -> dict[str, Slot]:
    """Every Hugging Face name of `model` (abstract or real, or its gradient) and its place in it."""
    table: dict[str, Slot] = {}
    for path, leaf in _flat(model).items():
        if "layers" not in path:
            table[".".join(path)] = Slot(path, None)
            continue
        before, after = path[: path.index("layers")], path[path.index("layers") + 1 :]
        for layer in range(leaf.shape[0]):
            table[".".join((*before, "layers", str(layer), *after))] = Slot(path, layer)
    return table


def to_hf_tensors(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor under its Hugging Face name. Works on a gradient as well: it has the model's tree."""
    leaves = _flat(model)
    # one stack on the host at a time is all that a reader who takes them in order needs
    held: tuple[ParamPath, np.ndarray] | None = None
    for name, slot in name_table(model).items():
        if held is None or held[0] != slot.path:
            held = slot.path, np.asarray(leaves[slot.path])
        yield name, held[1] if slot.layer is None else held[1][slot.layer]


def from_hf_tensors(
    model_class: Callable[..., Model],
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    dtype: Any,
) -> Model:
    """A model holding `tensors` (Hugging Face names), cast to `dtype`.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all of them in one message.
    """
    abstract = _abstract(model_class, config, dtype)
    table = name_table(abstract)
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
    faults = _compare(shapes, table, abstract, set())
    if faults:
        raise ValueError(report(f"{len(faults)} faults", faults))
    buffers = _allocate(abstract)
    for name, slot in table.items():
        _place(buffers, slot)[...] = np.asarray(tensors[name]).astype(
            buffers[slot.path].dtype, copy=False
        )
    return _merge(abstract, buffers)


def load(
    model_class: Callable[..., Model],
    config: LlamaConfig,
    directory: str | Path,
    dtype: Any = None,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Read a directory's safetensors, one tensor at a time, each to its final place.

    As in transformers, the decoder of any Llama's checkpoint can be read, whatever the head beside it;
    but a language-model head is never made up.

    Args:
        model_class: `LlamaForCausalLM` or another class taking `(config, rngs=, dtype=)`.
        dtype: of the weights; None keeps the stored one (the widest, where several are mixed).
        rngs: of the weights of a task's head that the directory has not; None is `nnx.Rngs(0)`.

    Warns:
        UserWarning: a task's head has been initialised, naming its tensors.

    Raises:
        ValueError: one message naming every missing, unexpected, mis-shaped, doubled, truncated or
            non-finite tensor.
    """
    directory = Path(directory)
    model_class = _quantized(model_class, directory)
    match = fit(model_class, config, open_weights(directory), directory, dtype)
    stored, table, abstract, faults = match.stored, match.table, match.abstract, match.faults
    # with a fault there will be no model: values are only looked at, for the rest of the report
    buffers = {} if faults else _allocate(abstract)

    def read(name: str) -> str | None:
        if buffers:
            place = _place(buffers, table[name])
        else:
            place = np.empty(stored[name].shape, CODE_DTYPES.get(stored[name].dtype, match.dtype))
        try:
            finite = read_tensor(stored[name], place)
        except (ValueError, OSError) as error:
            return str(error)
        return None if finite else f"{name}: holds non-finite values as {place.dtype}"

    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        faults += filter(None, pool.map(read, [name for name in stored if name in table]))
    if faults:
        raise ValueError(report(f"{directory}: {len(faults)} faults", faults))
    warn_ignored(config, directory)
    if match.new:
        key = (rngs or nnx.Rngs(0)).params()
        paths = [table[name].path for name in match.new]
        for path, value in _initial(model_class, config, match.dtype, key, paths).items():
            buffers[path][...] = value
        warnings.warn(
            f"{directory}: newly initialised {', '.join(match.new)}, of which it has no weights; "
            "train them before use",
            stacklevel=3,
        )
    return _merge(abstract, buffers)


def load_params(
    model_class: Callable[..., nnx.Module], directory: str | Path, params: dict[str, Any]
) -> dict[str, Any]:
    """Read a directory's weights straight onto devices, each process only the parts its devices hold.

    Args:
        params: the tree of `nnx.to_pure_dict`, of abstract arrays with shardings and the wanted dtype.

    Raises:
        ValueError: as `load`; non-finite values are found in the parts that are read.
    """
    directory = Path(directory)
    dtype = jax.tree.leaves(params)[0].dtype
    config = LlamaConfig.from_pretrained(directory)
    match = fit(model_class, config, open_weights(directory), directory, dtype)
    faults = [*match.faults, *(f"{name}: missing" for name in match.new)]
    if faults:
        raise ValueError(report(f"{directory}: {len(faults)} faults", faults))
    warn_ignored(config, directory)
    slots: dict[ParamPath, list[str]] = {}
    for name, slot in match.table.items():
        slots.setdefault(slot.path, []).append(name)  # in the order of the layers

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        key = tuple(str(each.key) for each in path)
        names = slots[key]
        stacked = match.table[names[0]].layer is not None

        def part(index: Any) -> np.ndarray:
            index = tuple(
                slice(*each.indices(n)) for each, n in zip(index, leaf.shape, strict=True)
            )
            out = _aligned(tuple(each.stop - each.start for each in index), leaf.dtype)
            chosen, inner = (names[index[0]], index[1:]) if stacked else (names, index)
            for place, name in zip(out if stacked else [out], chosen, strict=True):
                if not read_slice(match.stored[name], inner, place):
                    faults.append(f"{name}: holds non-finite values as {leaf.dtype}")
            return out

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    loaded = jax.tree_util.tree_map_with_path(place, params)
    if faults:
        raise ValueError(report(f"{directory}: {len(faults)} faults", faults))
    return loaded


def save(
    model: nnx.Module,
    config: LlamaConfig,
    directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    json_files: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write config.json, safetensors and `json_files` as a directory that transformers loads.

    Everything is written beside `directory` first and moved when complete. Of an earlier save in it, the
    weights and what else describes that model (generation config, adapter, record of a conversion) are
    replaced or removed; its other files are left alone.

    Args:
        max_shard_size: bytes per file, or "5GB"; one file `model.safetensors` where all fits.
    """
    directory, shard_size = Path(directory), size(max_shard_size)
    leaves, table = _flat(model), name_table(model)
    specs = []
    for name, slot in table.items():
        leaf = leaves[slot.path]
        shape = leaf.shape if slot.layer is None else leaf.shape[1:]
        specs.append(TensorSpec(name, np.dtype(leaf.dtype), tuple(shape)))
    dtypes = {str(spec.dtype) for spec in specs} - set(map(str, CODE_DTYPES.values()))
    fields = config.to_dict() | {"architectures": [type(model).__name__]}
    if (quantization := quantization_of(model)) is not None:
        fields["quantization_config"] = quantization.to_dict()
    if len(dtypes) == 1:
        # both majors of transformers: v4 reads torch_dtype, v5 dtype
        fields |= dict.fromkeys(("dtype", "torch_dtype"), dtypes.pop())
    tensors = to_hf_tensors(model)

    def next_tensor(name: str) -> np.ndarray:
        expected, array = next(tensors)
        assert expected == name, f"{expected} was to be written, asked for {name}"
        return array

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: found a file, expected a directory")
    with staged_directory(directory, into_existing=True, stale=_OF_EARLIER_SAVES) as staging:
        write_safetensors(staging, specs, next_tensor, max_shard_size=shard_size)
        for file, content in {**(json_files or {}), "config.json": fields}.items():
            # indented and sorted as transformers writes it
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
            write_text(staging / file, text + "\n")


@dataclass(frozen=True)
class Fit:
    """A directory's tensors beside the model they are for, and everything that does not fit.

    dtype: what the model would have. stored: by the model's names. embedding: its name there. tied: the
    copy of a tied head that some exporters write as well. new: what a task's head has and the directory
    has not. wrappers: what was taken out of the tensors' names, for people; "" where nothing was.
    """

    dtype: np.dtype
    abstract: Any
    table: dict[str, Slot]
    stored: dict[str, StoredTensor]
    embedding: str
    tied: StoredTensor | None
    new: list[str]
    faults: list[str]
    wrappers: str = ""


# reads part of a tensor as it is stored: rows(tensor, start, stop)
Rows = Callable[[StoredTensor, int, int], np.ndarray]


class Weights(NamedTuple):
    """The tensors of a directory's weight files by name, what is wrong with the files, and the names
    that the faulty files would have held (not to be called missing a second time)."""

    stored: dict[str, StoredTensor]
    faults: list[str]
    excused: set[str]


def fit(
    model_class: Callable[..., nnx.Module],
    config: LlamaConfig,
    weights: Weights,
    directory: Path,
    dtype: Any = None,
    rows: Rows | None = None,
) -> Fit:
    """Lay a directory's tensors beside the model of `config`: the check that every reader shares.

    No values are read, but of a tied head that is stored as well.

    Args:
        dtype: of the model; None keeps the stored one (the widest, where several are mixed).
        rows: what reads part of a tensor; None is for safetensors.

    Raises:
        ValueError: an unknown dtype, or more layers than there are tensors. All other faults are returned.
    """
    stored, faults, excused = weights
    shown = _unwrapped([*stored, *excused])
    wrappers = ", ".join(dict.fromkeys(filter(None, (each.taken for each in shown.values()))))
    named = {shown[name].name: tensor for name, tensor in stored.items()}
    if len(named) < len(stored):
        names = [shown[name].name for name in stored]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{directory}: {twice} is there with {wrappers} in its name and without")
    stored, excused = named, {shown[name].name for name in excused}
    if lora := next(filter(_LOW_RANK.search, stored), None):
        raise ValueError(
            f"{directory}: found the tensors of a PEFT adapter beside the model's ({lora}); merge them "
            "with peft: merge_and_unload(), then save_pretrained"
        )
    if dtype is None:
        floats = {tensor.dtype for tensor in stored.values()} - CODE_DTYPES.keys()
        dtype = widest({FLOAT_DTYPES[name] for name in floats})
    dtype = require_float(dtype)
    if config.num_hidden_layers > max(len(stored) + len(excused), 1):
        # an absurd count, before anything is laid out for it
        raise ValueError(
            f"{directory}: found {len(stored)} tensors, expected some for each of "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    abstract = _abstract(model_class, config, dtype)
    table = name_table(abstract)
    prefix = _decoder_prefix(table)
    stored = _with_prefix(stored, prefix)
    embedding = f"{prefix}embed_tokens.weight"
    tied = stored.pop(_LM_HEAD) if _is_tied_copy(stored, table, config) else None
    if tied is not None and embedding not in stored:
        # one tensor under two names: some writers keep the other one
        stored[embedding], tied = tied, None
    task_head = [name for name in table if name.startswith(_TASK_HEADS)]
    if task_head or not prefix:
        stored = {
            name: tensor
            for name, tensor in stored.items()
            if name in table or not name.startswith((_LM_HEAD, *_TASK_HEADS))
        }
    new = [name for name in task_head if name not in stored and name not in excused]
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    coded = next((name for name in stored if is_code(name)), None)
    if coded is not None and coded not in table:
        raise ValueError(
            f"{directory}: found quantised weights ({coded}), expected ordinary ones: take the checkpoint "
            "they were made from, or undo it: quantization.dequantize(model).save_pretrained(NEW_DIR)"
        )
    faults = faults + _compare(shapes, table, abstract, excused | set(new))
    leaves = _flat(abstract)
    for name in filter(is_code, stored.keys() & table.keys()):
        found, expected = CODE_DTYPES[stored[name].dtype], leaves[table[name].path].dtype
        if found != expected:
            faults.append(f"{name}: found dtype {found}, expected {expected}")
    if len(faults) > 1 and (prefix := _prefix_of_some(stored, table)):
        faults.insert(0, f"some names begin with {prefix!r} and others do not")
    if tied is not None and not faults:
        faults += _compare_tied(tied, stored[embedding], rows or read_rows)
    return Fit(dtype, abstract, table, stored, embedding, tied, new, faults, wrappers)


def read_rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor in a safetensors file, in the dtype in which they are stored."""
    stop = min(stop, tensor.shape[0])
    values = np.empty((stop - start, *tensor.shape[1:]), FLOAT_DTYPES[tensor.dtype])
    read_slice(tensor, (slice(start, stop), *(slice(n) for n in tensor.shape[1:])), values)
    return values


def _compare_tied(head: StoredTensor, embedding: StoredTensor, rows: Rows) -> list[str]:
    """Some exporters write the tied head as well: welcome if it is the embedding, a fault if not.

    Values are compared as they are stored, so that every reader decides alike.
    """
    same = head.shape == embedding.shape
    if same:
        step = max(1, _COMPARED_BYTES // max(head.shape[-1] * 8, 1))
        same = all(
            equal(rows(head, start, start + step), rows(embedding, start, start + step))
            for start in range(0, head.shape[0], step)
        )
    return [] if same else [OTHER_HEAD]


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays, perhaps of two dtypes, hold the same numbers."""
    wide = widest({one.dtype, other.dtype})
    return bool((one.astype(wide, copy=False) == other.astype(wide, copy=False)).all())


def warn_ignored(config: LlamaConfig, directory: Path) -> None:
    """Warn of what another program may obey."""
    for note in ignored_notes(config, directory):
        warnings.warn(f"{directory}: {note}", stacklevel=4)


def ignored_notes(config: LlamaConfig, directory: Path) -> list[str]:
    """`config.ignored` in words, and an adapter beside the weights, which transformers would apply."""
    notes = []
    if config.ignored:
        shown = ", ".join(f"{name} {str(value)[:40]}" for name, value in config.ignored.items())
        notes.append(f"config.json: {shown} ignored, as transformers' Llama does")
    if (directory / ADAPTER_CONFIG).exists():
        notes.append(
            f"{ADAPTER_CONFIG}: the PEFT adapter beside the weights is not applied; to apply it, load both "
            "with peft, then merge_and_unload() and save_pretrained(NEW_DIR)"
        )
    return notes


def _quantized(model_class: Callable[..., Model], directory: Path) -> Callable[..., Model]:
    """The class, or what makes its models quantised as those of `directory` are."""
    quantization = read_quantization(read_json_object(directory / "config.json"))
    if quantization is None:
        return model_class
    return lambda *args, **more: quantize(model_class(*args, **more), *quantization)


def _stored_dtypes(name: str) -> Iterable[str]:
    """What a tensor of this name may be stored as: a weight's codes as integers, all else as floats."""
    return CODE_DTYPES if is_code(name) else FLOAT_DTYPES


def is_code(name: str) -> bool:
    """Whether a tensor is the integers of a quantised weight."""
    return name.endswith(".weight.codes")


def asked_dtype(asked: Any) -> Any:
    """Without "auto" and the prefix of torch's names; torch's dtypes by name."""
    if asked is None or (isinstance(asked, str) and asked == "auto"):
        return None
    name = str(asked)
    if name.startswith("torch."):
        return name.removeprefix("torch.")
    try:
        return jnp.dtype(asked)
    except TypeError:
        return asked  # `require_float` names those that there are


def require_float(dtype: Any) -> np.dtype:
    """The dtype of a model's weights. Raises ValueError for one that they cannot have."""
    wanted = {str(known): known for known in FLOAT_DTYPES.values()}
    try:
        found = wanted[str(jnp.dtype(dtype))]
    except (TypeError, KeyError):
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(wanted)}") from None
    if found == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "dtype: found float64, expected jax_enable_x64 to be on, or another dtype asked for"
        )
    return found


def _flat(model: nnx.Module) -> dict[ParamPath, Any]:
    """Path -> array (or shape) of every parameter."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {tuple(map(str, path)): variable.get_value() for path, variable in flat}


def _abstract(model_class: Callable[..., Model], config: LlamaConfig, dtype: Any) -> Model:
    return nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0), dtype=dtype))


def _initial(
    model_class: Callable[..., nnx.Module],
    config: LlamaConfig,
    dtype: Any,
    key: Key[Array, ""],
    paths: Sequence[ParamPath],
) -> dict[ParamPath, Array]:
    """Initial values of the parameters at `paths`; the compiler drops all others."""

    def values() -> list[Array]:
        leaves = _flat(model_class(config, rngs=nnx.Rngs(params=key), dtype=dtype))
        return [leaves[path] for path in paths]

    return dict(zip(paths, jax.jit(values)(), strict=True))


def _allocate(abstract: nnx.Module) -> dict[ParamPath, np.ndarray]:
    return {path: _aligned(leaf.shape, leaf.dtype) for path, leaf in _flat(abstract).items()}


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory on a 64-byte boundary, which JAX on the CPU takes over without a copy."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _place(buffers: dict[ParamPath, np.ndarray], slot: Slot) -> np.ndarray:
    whole = buffers[slot.path]
    return whole if slot.layer is None else whole[slot.layer]


def _merge(abstract: Model, buffers: dict[ParamPath, np.ndarray]) -> Model:
    graphdef, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    filled = [
        (path, variable.replace(jax.device_put(buffers.pop(tuple(map(str, path))))))
        for path, variable in flat
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def open_weights(
    directory: Path,
    single: str = SINGLE_FILE,
    index: str = INDEX_FILE,
    read_header: Callable[[Path], Iterable[StoredTensor]] = read_header,
) -> Weights:
    """The headers of a directory's weight files: of one file, or of several and their index.

    Args:
        read_header: the tensors of one file; safetensors unless another is given.

    Raises:
        ValueError: no such files, or the only one cannot be read.
    """
    if (directory / single).exists():
        listed: dict[str, str] = {}
        files = [single]
    elif (directory / index).exists():
        listed = read_index(directory / index)
        files = sorted(set(listed.values()))
    else:
        raise ValueError(
            f"{directory}: expected weights in {single} or {index}; it is {describe(directory)}"
        )
    stored: dict[str, StoredTensor] = {}
    faults: list[str] = []
    excused: set[str] = set()
    for file in files:
        try:
            tensors = read_header(directory / file)
        except ValueError as error:
            if not listed:
                raise ValueError(f"{directory}: {error}") from None
            faults.append(str(error))
            excused |= {name for name, place in listed.items() if place == file}
            continue
        for tensor in tensors:
            if is_buffer(tensor.name):
                continue
            if _QUANTIZED_PARTS.search(tensor.name):
                raise ValueError(
                    f"{directory}: the weights are quantised by another program ({tensor.name}), which is "
                    "not supported; use the original checkpoint that is not quantised"
                )
            if tensor.name in stored:
                faults.append(f"{tensor.name}: in {stored[tensor.name].path.name} and in {file}")
            elif tensor.dtype not in (allowed := _stored_dtypes(tensor.name)):
                wanted = ", ".join(allowed)
                faults.append(f"{tensor.name}: found dtype {tensor.dtype}, expected {wanted}")
                excused.add(tensor.name)
            else:
                stored[tensor.name] = tensor
    return Weights(stored, faults, excused)


def widest(dtypes: set[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds every value of `dtypes`: float32 for float16 beside bfloat16."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file of the same directory. Raises ValueError for any other place."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: found no weight_map, expected tensor names and their files")
    for name, file in weight_map.items():
        if not _is_file_name(file):
            raise ValueError(
                f"{path}: tensor {name[:200]} is said to be in {repr(file)[:200]}, expected a file of "
                "the directory"
            )
    return weight_map


def _is_file_name(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or len(name) > 255:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return Path(name).name == name


_ROTARY_BUFFERS = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached"))


def is_buffer(name: str) -> bool:
    """Old checkpoints store the rotary frequencies, which follow from the config."""
    return name.endswith(_ROTARY_BUFFERS)


class _Unwrapped(NamedTuple):
    """A tensor's name without what wrappers put into it, and that."""

    name: str
    taken: str


def _unwrapped(names: Sequence[str]) -> dict[str, _Unwrapped]:
    """Each name without what wraps the model: wrappers' own segments, and what stands before every name."""
    inner = {name: _WRAPPERS.sub("", name) for name in names}
    outer = next((match["outer"] for match in map(_OUTER.match, inner.values()) if match), "")
    if not all(name.startswith(outer) for name in inner.values()):
        outer = ""  # a model beside others, or a mixture: said as it is
    return {
        name: _Unwrapped(
            short.removeprefix(outer),
            ", ".join(sorted({*_WRAPPERS.findall(name), *([outer] if outer else [])})),
        )
        for name, short in inner.items()
    }


def _prefix_of_some(stored: Mapping[str, Any], table: Mapping[str, Slot]) -> str:
    """A prefix without which names that are not of the model would be; "" where there is none."""
    matches = (_OUTER.match(name) for name in stored if name not in table)
    outers = {match["outer"] for match in matches if match}
    return next((outer for outer in sorted(outers) if outer), "")


def _decoder_prefix(names: Iterable[str]) -> str:
    """What stands before the decoder's names: nothing for the bare decoder."""
    return next(match["prefix"] for match in map(_DECODER.match, names) if match)


def _with_prefix(stored: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The decoder's tensors renamed for a class whose own have `prefix`, if none of them has it yet."""
    matches = {name: _DECODER.match(name) for name in stored}
    if any(match and match["prefix"] == prefix for match in matches.values()):
        matches = {}
    return {
        prefix + name.removeprefix(match["prefix"])
        if (match := matches.get(name))
        else name: tensor
        for name, tensor in stored.items()
    }


def _is_tied_copy(
    stored: Mapping[str, Any], table: Mapping[str, Slot], config: LlamaConfig
) -> bool:
    return config.tie_word_embeddings and _LM_HEAD in stored and _LM_HEAD not in table


def _compare(
    shapes: Mapping[str, tuple[int, ...]],
    table: Mapping[str, Slot],
    abstract: nnx.Module,
    excused: set[str],
) -> list[str]:
    leaves = _flat(abstract)
    faults = [f"{name}: missing" for name in table if name not in shapes and name not in excused]
    for name, found in shapes.items():
        if name not in table:
            faults.append(f"{name}: unexpected")
            continue
        slot = table[name]
        shape = leaves[slot.path].shape
        expected = tuple(shape) if slot.layer is None else tuple(shape[1:])
        if found != expected:
            faults.append(f"{name}: found shape {list(found)}, expected {list(expected)}")
    return faults


def report(title: str, faults: list[str], limit: int = 20) -> str:
    """All faults as one line, the first `limit` of them in full."""
    shown = "; ".join(faults[:limit])
    more = f"; and {len(faults) - limit} more" if len(faults) > limit else ""
    return f"{title}: {shown}{more}"
