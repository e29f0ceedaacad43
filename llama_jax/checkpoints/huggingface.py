"""Read and write Hugging Face safetensors directories."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from llama_jax.checkpoints.adapter import (
    adapted_config,
    compare_with_base,
    merge,
    open_adapter,
    source_of,
)
from llama_jax.checkpoints.match import (
    CheckpointMatch,
    Model,
    abstract_model,
    compare_shapes,
    match_checkpoint,
)
from llama_jax.checkpoints.names import ParamPath, ParamSlice, flat_params, name_table
from llama_jax.checkpoints.quantized import compressed_tensors_write
from llama_jax.checkpoints.quantized.weights import with_codes
from llama_jax.checkpoints.safetensors_read import (
    CODE_DTYPES,
    StoredTensor,
    all_finite,
    read_slice,
    read_tensor,
    stored_dtype,
)
from llama_jax.checkpoints.safetensors_write import TensorSpec, write_safetensors
from llama_jax.checkpoints.weight_files import open_weights
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import ADAPTER_CONFIG
from llama_jax.files.json_object import read_json_object
from llama_jax.files.mapping import FilePart, can_map, map_parts
from llama_jax.files.paths import source_path
from llama_jax.files.remote import is_remote
from llama_jax.files.staging import staged_directory, write_text
from llama_jax.files.upload import output_directory
from llama_jax.formatting import size, summarize
from llama_jax.quantization.model import (
    Quantization,
    quantization_of,
    quantize,
    read_quantization,
)

_WORKERS = min(8, os.cpu_count() or 1)
# Bytes of a model. Smaller ones are copied in less than a second, into large pages, from which a step of
# decoding in float32 takes 4% less time.
_MAPPED_FROM = 2**30
_MAPPED_TENSOR = 2**16  # bytes; the least
# files of an earlier save that would be taken for the new model's
_STALE = (
    "generation_config.json",
    "conversion.json",
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
    "adapter_model.bin",
)


def to_hf_tensors(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of a model's tensors, or of a gradient's, which has the same tree."""
    leaves = flat_params(model)
    # names come in the order of the stacks, so one stack at a time is copied to the host
    on_host: tuple[ParamPath, np.ndarray] | None = None
    for name, target in name_table(model).items():
        if on_host is None or on_host[0] != target.path:
            on_host = target.path, np.asarray(leaves[target.path])
        yield name, on_host[1] if target.layer is None else on_host[1][target.layer]


def from_hf_tensors(
    model_class: Callable[..., Model],
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    dtype: DTypeLike,
) -> Model:
    """A model of `tensors`, which have Hugging Face names, cast to `dtype`.

    Raises:
        ValueError: tensors that are missing, unexpected or of the wrong shape, all in one message.
    """
    abstract = abstract_model(model_class, config, dtype)
    table = name_table(abstract)
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
    problems = compare_shapes(shapes, table, abstract)
    if problems:
        raise ValueError(summarize(f"{len(problems)} problems", problems))
    buffers = _allocate(abstract)
    for name, target in table.items():
        out = _slice_of(buffers, target)
        out[...] = np.asarray(tensors[name]).astype(out.dtype, copy=False)
    return _merge(abstract, buffers)


def load(
    model_class: Callable[..., Model],
    config: LlamaConfig,
    directory: str | Path,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs | None = None,
    dequantize: bool = True,
) -> Model:
    """Load a model from a directory of safetensors; each tensor is read straight into its parameter.

    Of a model of 1 GiB or more, tensors in the model's dtype are mapped, if they lie on complete pages, as
    in files that this library writes: then nothing is copied. Such files may be replaced, but must not be
    changed in place, while the model is in use.

    As in transformers, a model can be loaded from the checkpoint of any Llama, whatever head it has. A
    missing task head is initialized; a missing language-model head is an error.

    Args:
        model_class: `LlamaForCausalLM` or another class that takes `(config, rngs=, dtype=)`.
        dtype: of the weights; None keeps the stored one (the widest, if there are several).
        rngs: seeds for task-head weights that the checkpoint lacks; None is `nnx.Rngs(0)`.
        dequantize: weights that another program quantized; if not, their codes and scales are kept.

    Warns:
        UserWarning: a task head was initialized; names its tensors.

    Raises:
        ValueError: one message with every tensor that is missing, unexpected, duplicate, truncated, of the
            wrong shape, or not finite.
    """
    directory = source_path(directory)
    model_class = _quantized(model_class, directory)
    weights = open_weights(directory)
    if not dequantize and weights.scheme:
        try:
            tensors, bits, group_size = with_codes(weights.tensors)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        weights = weights._replace(tensors=tensors)
        quantization = Quantization(bits, group_size, vocabulary=False)
        model_class = _quantizing(model_class, quantization)
    match = match_checkpoint(model_class, config, weights, directory, dtype)
    tensors, table, problems = match.tensors, match.table, match.problems
    # with a problem there will be no model, but values are still checked, for a complete error
    mapped = {} if problems else _map(match)
    buffers = {} if problems else _allocate(match.abstract, mapped)

    def read(name: str) -> str | None:
        tensor = tensors[name]
        if buffers:
            out = _slice_of(buffers, table[name])
        else:
            out = np.empty(tensor.shape, CODE_DTYPES.get(tensor.dtype, match.dtype))
        try:
            if name in table and table[name].path in mapped:
                finite = tensor.dtype in CODE_DTYPES or all_finite(out)
            else:
                finite = read_tensor(tensor, out)
        except (ValueError, OSError) as error:
            return str(error)
        return None if finite else f"{name}: holds non-finite values as {out.dtype}"

    with ThreadPoolExecutor(_WORKERS) as pool:
        problems += filter(None, pool.map(read, [name for name in tensors if name in table]))
    _require_no_problems(problems, directory)
    warn_ignored(config, directory, weights.notes)
    if match.missing_head:
        key = (rngs or nnx.Rngs(0)).params()
        paths = [table[name].path for name in match.missing_head]
        for path, value in _initial(model_class, config, match.dtype, key, paths).items():
            buffers[path][...] = value
        warnings.warn(
            f"{directory}: randomly initialized {', '.join(match.missing_head)}, missing from the "
            "checkpoint; train before use",
            stacklevel=3,
        )
    return _merge(match.abstract, buffers)


def with_adapter(model: Model, base: LlamaConfig, directory: Path) -> Model:
    """The model with a LoRA adapter of PEFT merged into it, in float32 and rounded once to its dtype.

    Parameters that the adapter leaves alone are shared with `model`.

    Args:
        base: the model's config.
        directory: with adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: a quantized model; an adapter that is damaged, cannot be merged, or is for another
            model.
    """
    if quantization_of(model) is not None:
        raise ValueError("adapter: found quantized weights, expected unquantized ones")
    adapter = open_adapter(directory)
    leaves, table = flat_params(model), name_table(model)
    dtype = jax.tree.leaves(leaves)[0].dtype
    abstract = abstract_model(type(model), adapted_config(adapter, base), dtype)
    merged, new_leaves = name_table(abstract), flat_params(abstract)
    shapes, new_shapes = (
        {name: _shape_of(params, target) for name, target in each.items()}
        for params, each in ((leaves, table), (new_leaves, merged))
    )
    if problems := compare_with_base(adapter, shapes, new_shapes):
        raise ValueError(summarize(f"{directory}: is for another base model", problems))
    names: dict[ParamPath, list[str]] = {}
    for name, target in merged.items():
        names.setdefault(target.path, []).append(name)
    buffers: dict[ParamPath, Any] = {}
    for path, new in new_leaves.items():
        if path in leaves and not any(name in adapter.updates for name in names[path]):
            buffers[path] = leaves[path]
            continue
        buffers[path] = _aligned(new.shape, new.dtype)
        for name in names[path]:
            source = source_of(name, adapter, base)
            values = None if source is None else np.asarray(_slice_of(leaves, table[source]))
            if update := adapter.updates.get(name):
                values = merge(update, values)
            _slice_of(buffers, merged[name])[...] = (
                0 if values is None else values.astype(new.dtype)
            )
    return _merge(abstract, buffers)


def load_params(
    model_class: Callable[..., nnx.Module], directory: str | Path, params: dict[str, Any]
) -> dict[str, Any]:
    """Load weights straight onto devices; each process reads only the parts of its own devices.

    Args:
        params: the tree of `nnx.to_pure_dict`, of abstract arrays with shardings and dtypes.

    Raises:
        ValueError: as `load`; non-finite values are only detected in the parts that are read.
    """
    directory = source_path(directory)
    dtype = jax.tree.leaves(params)[0].dtype
    config = LlamaConfig.from_pretrained(directory)
    weights = open_weights(directory)
    match = match_checkpoint(model_class, config, weights, directory, dtype)
    _require_no_problems(
        [*match.problems, *(f"{name}: missing" for name in match.missing_head)], directory
    )
    warn_ignored(config, directory, weights.notes)
    problems: list[str] = []

    def read(name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        if not read_slice(match.tensors[name], index, out):
            problems.append(f"{name}: holds non-finite values as {out.dtype}")

    loaded = place_tensors(match.table, params, read)
    _require_no_problems(problems, directory)
    return loaded


def place_tensors(
    table: Mapping[str, ParamSlice],
    params: dict[str, Any],
    read: Callable[[str, tuple[slice, ...], np.ndarray], None],
) -> dict[str, Any]:
    """Arrays like `params` from tensors by Hugging Face's names; each process reads its devices' parts.

    Args:
        table: as `name_table` returns it.
        params: as for `load_params`.
        read: `read(name, index, out)` puts `tensor[index]` into `out`.
    """
    names_of: dict[ParamPath, list[str]] = {}
    for name, target in table.items():
        names_of.setdefault(target.path, []).append(name)  # in the order of the layers

    def load_array(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        names = names_of[tuple(str(key.key) for key in path)]
        stacked = table[names[0]].layer is not None

        def read_part(index: Any) -> np.ndarray:
            index = tuple(slice(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True))
            part = _aligned(tuple(s.stop - s.start for s in index), leaf.dtype)
            tensors, rest = (names[index[0]], index[1:]) if stacked else (names, index)
            for name, out in zip(tensors, part if stacked else [part], strict=True):
                read(name, rest, out)
            return part

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read_part)

    return jax.tree_util.tree_map_with_path(load_array, params)


def save(
    model: nnx.Module,
    config: LlamaConfig,
    directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    json_files: Mapping[str, Mapping[str, Any]] | None = None,
    compressed_tensors: bool = False,
) -> None:
    """Write config.json, safetensors and `json_files` into a directory that transformers can load.

    Files are moved into `directory` once all are complete. The weights of an earlier save in it, and what
    describes them (generation config, adapter, record of a conversion), are replaced or removed; other
    files are left alone. A remote directory must not exist; it is uploaded from a temporary one.

    Args:
        max_shard_size: bytes per file, or text such as "5GB"; smaller models get one `model.safetensors`.
        json_files: content of further JSON files, by name.
        compressed_tensors: store a quantized model in that format, which vLLM loads.

    Raises:
        ValueError: `directory` is a file, max_shard_size is not a size, or compressed-tensors cannot hold
            the model.
    """
    shard_size = size(max_shard_size)
    leaves, table = flat_params(model), name_table(model)
    specs = []
    for name, target in table.items():
        leaf = leaves[target.path]
        shape = leaf.shape if target.layer is None else leaf.shape[1:]
        specs.append(TensorSpec(name, np.dtype(leaf.dtype), tuple(shape)))
    dtypes = {str(spec.dtype) for spec in specs} - set(map(str, CODE_DTYPES.values()))
    fields = config.to_dict() | {"architectures": [type(model).__name__]}
    if (quantization := quantization_of(model)) is not None:
        fields["quantization_config"] = quantization.to_dict()
    if len(dtypes) == 1:
        # transformers 4 reads torch_dtype, 5 reads dtype
        fields |= dict.fromkeys(("dtype", "torch_dtype"), dtypes.pop())
    tensors = to_hf_tensors(model)
    if compressed_tensors:
        if quantization is None:
            raise ValueError("compressed_tensors: found a model that is not quantized")
        specs, tensors = compressed_tensors_write.stored_tensors(model, quantization)
        fields["quantization_config"] = compressed_tensors_write.config(quantization)

    def next_tensor(name: str) -> np.ndarray:
        next_name, array = next(tensors)
        assert next_name == name, f"the next tensor is {next_name}, not {name}"
        return array

    with output_directory(directory) as local:
        if local.exists() and not local.is_dir():
            raise ValueError(f"{local}: found a file, expected a directory")
        with staged_directory(local, into_existing=True, stale=_STALE) as staging:
            write_safetensors(staging, specs, next_tensor, max_shard_size=shard_size)
            for file, content in {**(json_files or {}), "config.json": fields}.items():
                # formatted as transformers does
                text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
                write_text(staging / file, text + "\n")


def warn_ignored(config: LlamaConfig, directory: Path, notes: Sequence[str] = ()) -> None:
    """Warn of settings that are ignored here and that another program may follow.

    Args:
        notes: further ones.
    """
    for note in (*notes, *ignored_notes(config, directory)):
        warnings.warn(f"{directory}: {note}", stacklevel=4)


def ignored_notes(config: LlamaConfig, directory: Path) -> list[str]:
    """Notes about ignored config fields, and about an adapter, which transformers would apply."""
    notes = []
    if config.ignored:
        shown = ", ".join(f"{name} {str(value)[:40]}" for name, value in config.ignored.items())
        notes.append(f"config.json: {shown} ignored, as transformers' Llama does")
    if (directory / ADAPTER_CONFIG).exists():
        notes.append(
            f"{ADAPTER_CONFIG}: the PEFT adapter beside the weights is not applied; to apply it, load with "
            f"adapter={str(directory)!r} or convert with --adapter {directory}"
        )
    return notes


def _quantized(model_class: Callable[..., Model], directory: Path) -> Callable[..., Model]:
    """The class, or a function that quantizes its models like those of `directory`."""
    quantization = read_quantization(read_json_object(directory / "config.json"))
    return model_class if quantization is None else _quantizing(model_class, quantization)


def _quantizing(
    model_class: Callable[..., Model], quantization: Quantization
) -> Callable[..., Model]:
    return lambda *args, **kwargs: quantize(model_class(*args, **kwargs), *quantization)


def _initial(
    model_class: Callable[..., nnx.Module],
    config: LlamaConfig,
    dtype: DTypeLike,
    key: Key[Array, ""],
    paths: Sequence[ParamPath],
) -> dict[ParamPath, Array]:
    """Initial values of the parameters at `paths`; the compiler removes all others."""

    def values() -> list[Array]:
        leaves = flat_params(model_class(config, rngs=nnx.Rngs(params=key), dtype=dtype))
        return [leaves[path] for path in paths]

    return dict(zip(paths, jax.jit(values)(), strict=True))


def _map(match: CheckpointMatch) -> dict[ParamPath, np.ndarray]:
    """The parameters of a large model that are in the files as they are in it, in complete pages."""
    if sum(tensor.nbytes for tensor in match.tensors.values()) < _MAPPED_FROM:
        return {}
    parts: dict[ParamPath, list[FilePart | None]] = {}
    params = flat_params(match.abstract)
    for name, target in match.table.items():  # in the order of the layers
        tensor, param = match.tensors.get(name), params[target.path]
        as_stored = (
            type(tensor) is StoredTensor
            and tensor.nbytes >= _MAPPED_TENSOR
            and not is_remote(tensor.path)
            and stored_dtype(tensor.dtype) == param.dtype
        )
        part = FilePart(tensor.path, tensor.offset, tensor.nbytes) if tensor and as_stored else None
        parts.setdefault(target.path, []).append(part if part and can_map(part) else None)
    complete = {path: found for path, found in parts.items() if None not in found}
    with ThreadPoolExecutor(_WORKERS) as pool:
        arrays = pool.map(map_parts, complete.values())
    return {
        path: array.view(params[path].dtype).reshape(params[path].shape)
        for path, array in zip(complete, arrays, strict=True)
        if array is not None
    }


def _allocate(
    abstract: nnx.Module, mapped: Mapping[ParamPath, np.ndarray] | None = None
) -> dict[ParamPath, np.ndarray]:
    """Memory for the parameters, uninitialized but for those that are there."""
    there = mapped or {}
    return {
        path: there[path] if path in there else _aligned(leaf.shape, leaf.dtype)
        for path, leaf in flat_params(abstract).items()
    }


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Uninitialized memory on a 64-byte boundary, which JAX on the CPU adopts without a copy."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _shape_of(params: Mapping[ParamPath, Any], target: ParamSlice) -> tuple[int, ...]:
    shape: tuple[int, ...] = tuple(params[target.path].shape)
    return shape if target.layer is None else shape[1:]


def _slice_of(buffers: Mapping[ParamPath, Any], target: ParamSlice) -> Any:
    stack = buffers[target.path]
    return stack if target.layer is None else stack[target.layer]


def _require_no_problems(problems: list[str], directory: Path) -> None:
    if problems:
        raise ValueError(summarize(f"{directory}: {len(problems)} problems", problems))


def _merge(abstract: Model, buffers: dict[ParamPath, Any]) -> Model:
    graphdef, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    filled = [
        (path, variable.replace(jax.device_put(buffers.pop(tuple(map(str, path))))))
        for path, variable in flat
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
