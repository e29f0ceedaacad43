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
from jaxtyping import Array, Key

from llama_jax.checkpoints.fit import Model, _compare, abstract_model, fit, open_weights
from llama_jax.checkpoints.names import (
    ParamPath,
    Slot,
    flat_params,
    name_table,
)
from llama_jax.checkpoints.safetensors_read import (
    CODE_DTYPES,
    read_slice,
    read_tensor,
)
from llama_jax.checkpoints.safetensors_write import (
    TensorSpec,
    write_safetensors,
)
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import ADAPTER_CONFIG
from llama_jax.files.json_object import read_json_object
from llama_jax.files.staging import staged_directory, write_text
from llama_jax.formatting import report, size
from llama_jax.quantization.model import quantization_of, quantize, read_quantization

# what describes the model that an earlier save has left in a directory, and would describe the new one
_OF_EARLIER_SAVES = (
    "generation_config.json",
    "conversion.json",
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
    "adapter_model.bin",
)


def to_hf_tensors(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor under its Hugging Face name. Works on a gradient as well: it has the model's tree."""
    leaves = flat_params(model)
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
    abstract = abstract_model(model_class, config, dtype)
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
    leaves, table = flat_params(model), name_table(model)
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


def _initial(
    model_class: Callable[..., nnx.Module],
    config: LlamaConfig,
    dtype: Any,
    key: Key[Array, ""],
    paths: Sequence[ParamPath],
) -> dict[ParamPath, Array]:
    """Initial values of the parameters at `paths`; the compiler drops all others."""

    def values() -> list[Array]:
        leaves = flat_params(model_class(config, rngs=nnx.Rngs(params=key), dtype=dtype))
        return [leaves[path] for path in paths]

    return dict(zip(paths, jax.jit(values)(), strict=True))


def _allocate(abstract: nnx.Module) -> dict[ParamPath, np.ndarray]:
    return {path: _aligned(leaf.shape, leaf.dtype) for path, leaf in flat_params(abstract).items()}


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
