"""Orbax checkpoints: what `python -m train` saves, and converted weights that any JAX program restores.

A converted directory has config.json, the tokenizer and `params/`, which
`ocp.StandardCheckpointer().restore(DIR / "params", abstract)` reads onto any mesh. Layers are stacked
there, as in the model, and a stack of an 8B model's layers takes 3.8 GB. So Orbax writes the tree,
TensorStore, which is what Orbax itself stores arrays with, the empty arrays, and each layer is a chunk of
its own: a file of its bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from convert.casting import casts
from convert.checkpoint import (
    DTYPES,
    Checkpoint,
    common_dtype,
    in_dtype,
    no_losses,
    plain_bytes,
)
from convert.companions import read_companions, require_inside, write_companions
from convert.formats.huggingface import stored_facts, write_config
from convert.model_card import card_facts
from llama_jax.checkpoints.fingerprint import fingerprint
from llama_jax.checkpoints.fit import Weights, fit, widest
from llama_jax.checkpoints.huggingface import ignored_notes
from llama_jax.checkpoints.orbax import PARAMS, is_orbax, locate, quiet_orbax
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor, read_tensor
from llama_jax.checkpoints.safetensors_write import DTYPE_NAMES as STORED_NAMES
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.json_object import read_json_object
from llama_jax.formatting import first_line, report
from llama_jax.models.causal_lm import LlamaForCausalLM

TITLE = "Orbax"
DTYPE_NAMES = tuple(DTYPES)
rule = casts
stored_bytes = plain_bytes
losses = no_losses
recognises = is_orbax
_CHUNK_BYTES = 2**26  # of tensors that are not stacked
_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.(.+)")
_METADATA_KEY = re.compile(r"(.+)/(\.zarray|zarr\.json)")


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The Llama in an Orbax directory; of a run, the newest step. No values are read before `load`.

    Raises ValueError for a directory without a finished checkpoint, arrays that are missing, damaged,
    unexpected or misshapen, and another architecture.
    """
    home, params = locate(path)
    require_inside(home, "config.json")
    config = LlamaConfig.from_pretrained(home)
    stores = _open(params)
    faults: list[str] = []
    excused: set[str] = set()
    stored: dict[str, StoredTensor] = {}
    places: dict[str, tuple[str, int | None]] = {}
    for leaf, (store, complete) in stores.items():
        dtype = STORED_NAMES.get(np.dtype(store.dtype.numpy_dtype), str(store.dtype))
        before, _, after = leaf.partition(".layers.")
        names = [leaf]
        if after:
            if store.ndim == 0 or store.shape[0] > 2**16:
                faults.append(
                    f"{leaf}: found shape {list(store.shape)}, expected a stack of layers"
                )
                continue
            names = [f"{before}.layers.{layer}.{after}" for layer in range(store.shape[0])]
        if dtype not in FLOAT_DTYPES:
            faults.append(f"{leaf}: found dtype {dtype}, expected {', '.join(FLOAT_DTYPES)}")
        elif not complete:
            faults.append(f"{leaf}: some of its chunks are missing")
        if faults:
            excused |= set(names)
            continue
        shape = tuple(store.shape[1:] if after else store.shape)
        nbytes = math.prod(shape) * FLOAT_DTYPES[dtype].itemsize
        plain = bool(after) and _is_plain(store)
        for layer, name in enumerate(names):
            file = params / leaf / _chunk_name(layer, store.ndim) if plain else params
            stored[name] = StoredTensor(file, name, dtype, shape, 0, nbytes)
            places[name] = leaf, layer if after else None

    held: dict[str, np.ndarray] = {}  # the one stack whose chunks span several layers
    expected = _fingerprints(params, list(stores))
    sums: dict[str, dict[int, int]] = {leaf: {} for leaf in stores}

    def load(name: str) -> np.ndarray:
        leaf, layer = places[name]
        store = stores[leaf][0]
        try:
            if stored[name].path != params:
                values = _read_chunk(stored[name])
            elif layer is None:
                values = store.read().result()
            elif _chunk(store)[0] == 1:
                values = store[layer].read().result()
            else:
                if leaf not in held:
                    held.clear()
                    held[leaf] = store.read().result()
                values = held[leaf][layer].copy()
        except (ValueError, OSError) as error:
            raise ValueError(f"{params}: tensor {name}: {first_line(error)}") from None
        if expected:
            part = values if layer is None else values[None]
            sums[leaf][layer or 0] = int(jax.jit(fingerprint)(part, layer or 0))
            complete = layer is None or len(sums[leaf]) == store.shape[0]
            if complete and sum(sums[leaf].values()) % 2**32 != expected[leaf]:
                raise ValueError(
                    f"{params}: {leaf}: its values are not what was saved: the checkpoint is damaged"
                )
        return values

    whole: dict[str, np.ndarray] = {}

    def rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        if tensor.name not in whole:
            whole[tensor.name] = load(tensor.name)
        return whole[tensor.name][start:stop]

    weights = Weights(stored, faults, excused)
    found = fit(LlamaForCausalLM, config, weights, path, "float32", rows)
    whole.clear()
    if found.faults:
        raise ValueError(report(str(path), found.faults))
    specs = tuple(
        TensorSpec(name, FLOAT_DTYPES[tensor.dtype], tensor.shape)
        for name, tensor in ((name, found.stored[name]) for name in found.table)
    )
    facts, notes = card_facts(home)
    notes += ignored_notes(config, home)
    if found.tied is not None:
        notes.append("lm_head.weight, a copy of the embedding, is left out: the head is tied")
    return Checkpoint(
        format=f"{TITLE}, {params.relative_to(home)}",
        config=config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        tensors=specs,
        load=lambda name: load(found.stored[name].name),
        dtype=common_dtype(specs),
        files=read_companions(home, tokenizer=tokenizer),
        facts=stored_facts(list(stored.values()))
        | {"file_bytes": sum(f.stat().st_size for f in params.rglob("*") if f.is_file())}
        | facts,
        notes=tuple(notes),
    )


def _fingerprints(params: Path, leaves: list[str]) -> dict[str, int]:
    """What `python -m train` has recorded of every leaf; {} where it has not."""
    file = params.parent / "facts" / "metadata"
    if not file.is_file():
        return {}
    found = read_json_object(file).get("fingerprints")
    # of parameters and optimizer state, in the order of a tree's leaves
    ordered = sorted(leaves, key=lambda leaf: leaf.split("."))
    if not isinstance(found, list) or len(found) < len(ordered):
        raise ValueError(f"{file}: found no fingerprints, expected those of {len(ordered)} arrays")
    return dict(zip(ordered, found, strict=False))


def specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as they will be: a stack has one dtype, the widest of its layers'."""
    wanted = in_dtype(checkpoint, dtype)
    stacks: dict[str, set[np.dtype[Any]]] = {}
    for spec in wanted:
        stacks.setdefault(_place(spec.name)[0], set()).add(spec.dtype)
    return [replace(spec, dtype=widest(stacks[_place(spec.name)[0]])) for spec in wanted]


def write(checkpoint: Checkpoint, directory: Path, progress: Callable[[int], None]) -> None:
    """Write `checkpoint` into the new directory `directory`, a layer's tensor at a time.

    Raises OSError or ValueError for the disk's faults, and what `checkpoint.load` raises.
    """
    directory.mkdir()
    params = directory / PARAMS
    leaves: dict[str, list[TensorSpec]] = {}
    for spec in checkpoint.tensors:
        leaves.setdefault(_place(spec.name)[0], []).append(spec)
    tree: dict[str, Any] = {}
    for leaf in leaves:
        *parents, last = leaf.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.zeros(1)  # a stand-in: its array is made anew below
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(params.absolute(), args=ocp.args.PyTreeSave(tree))
    chunks = {
        leaf: _create(params, leaf, members, stacked=_place(members[0].name)[1] is not None)
        for leaf, members in leaves.items()
    }
    for spec in checkpoint.tensors:
        leaf, layer = _place(spec.name)
        values, chunk = checkpoint.load(spec.name), chunks[leaf]
        if layer is not None:
            _write_chunk(params / leaf, layer, values, chunk)
        else:
            for number, start in enumerate(range(0, len(values), chunk[0])):
                _write_chunk(params / leaf, number, values[start : start + chunk[0]], chunk)
        progress(spec.nbytes)
    write_config(checkpoint, directory)
    write_companions(directory, checkpoint.files)


def _place(name: str) -> tuple[str, int | None]:
    """The leaf of the parameter tree that holds a tensor, and its layer in a stack."""
    match = _LAYER.fullmatch(name)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else (name, None)


def _write_chunk(array: Path, number: int, values: np.ndarray, chunk: tuple[int, ...]) -> None:
    """One chunk along the first axis: without compression its file is its bytes, the last one filled up.

    As TensorStore would write it, which takes twice as long.
    """
    with (array / _chunk_name(number, len(chunk))).open("wb") as file:
        file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        file.truncate(math.prod(chunk) * values.dtype.itemsize)


def _create(
    params: Path, leaf: str, members: list[TensorSpec], *, stacked: bool
) -> tuple[int, ...]:
    """Make the empty array of a leaf, uncompressed, for trained weights do not compress.

    Returns the shape of its chunks.
    """
    shape = members[0].shape
    if stacked:
        whole, chunk = (len(members), *shape), (1, *shape)
    else:
        row = math.prod(shape[1:]) * members[0].dtype.itemsize
        whole, chunk = shape, (max(1, min(shape[0], _CHUNK_BYTES // row)), *shape[1:])
    dtype = members[0].dtype
    metadata = {
        "zarr_format": 2,
        "shape": whole,
        "chunks": chunk,
        "dtype": "bfloat16" if dtype == DTYPES["bfloat16"] else dtype.str,
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
    }
    spec = {"driver": "zarr", "kvstore": _files(params / leaf), "metadata": metadata}
    return _chunk(ts.open(spec, create=True, delete_existing=True).result())


def _is_plain(store: ts.TensorStore) -> bool:
    """Whether a layer is a file of its bytes, as `write` makes it."""
    spec = store.spec().to_json()
    metadata, found = spec["metadata"], np.dtype(store.dtype.numpy_dtype)
    return (
        spec["driver"] == "zarr"
        and spec["kvstore"]["driver"] == "file"
        and _chunk(store) == (1, *store.shape[1:])
        and metadata["compressor"] is None
        and not metadata.get("filters")
        and metadata["order"] == "C"
        and metadata["dimension_separator"] == "."
        and metadata["dtype"] in ("bfloat16", found.newbyteorder("<").str)
    )


def _read_chunk(tensor: StoredTensor) -> np.ndarray:
    """A layer that is a file of its bytes. Raises ValueError for a file of another size."""
    size = tensor.path.stat().st_size
    if size != tensor.nbytes:
        raise ValueError(f"{size} bytes in {tensor.path}, expected {tensor.nbytes}")
    values = np.empty(tensor.shape, FLOAT_DTYPES[tensor.dtype])
    read_tensor(tensor, values)
    return values


def _chunk_name(number: int, dimensions: int) -> str:
    """The file of a chunk along the first axis."""
    return ".".join([str(number), *["0"] * (dimensions - 1)])


def _chunk(store: ts.TensorStore) -> tuple[int, ...]:
    """The shape of what is stored as one piece."""
    return tuple(int(n or 1) for n in store.chunk_layout.write_chunk.shape or ())


def _files(directory: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{directory.absolute()}/"}


def _open(params: Path) -> dict[str, tuple[ts.TensorStore, bool]]:
    """Every array by the name of its leaf, and whether all of its chunks are there.

    A chunk that is missing would be read as zeros.
    """
    if not (params / "_METADATA").is_file():
        raise ValueError(f"{params}: found no _METADATA, expected an Orbax checkpoint")
    for link in params.rglob("*"):
        if link.is_symlink() and not link.resolve().is_relative_to(params.resolve()):
            raise ValueError(f"{link}: a link to {link.resolve()}, expected it to stay within")
    base: dict[str, Any] = _files(params)
    if (params / "manifest.ocdbt").exists():
        base = {"driver": "ocdbt", "base": base}
    try:
        keys = [key.decode() for key in ts.KvStore.open(base).result().list().result()]
        stores = {}
        for key in keys:
            if match := _METADATA_KEY.fullmatch(key):
                leaf = match[1]
                spec = {
                    "driver": "zarr" if match[2] == ".zarray" else "zarr3",
                    "kvstore": {**base, "path": base.get("path", "") + f"{leaf}/"},
                }
                store = ts.open(spec, open=True).result()
                grid = [math.ceil(n / c) for n, c in zip(store.shape, _chunk(store), strict=True)]
                present = sum(other.startswith(f"{leaf}/") for other in keys) - 1
                stores[leaf] = store, present >= math.prod(grid)
    except Exception as error:  # TensorStore raises whatever the damage leads it to
        raise ValueError(f"{params}: not an Orbax checkpoint ({first_line(error)})") from None
    return stores
