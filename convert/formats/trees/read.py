"""Read any Orbax tree of arrays through a map of names."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from convert.companions import read_companions, require_inside
from convert.formats.directory import checkpoint_of
from convert.formats.llama_tensors import rotary_heads, tensor_shapes, to_halves
from convert.formats.orbax.arrays import StoredArray, files_of, open_arrays, start_reading
from convert.formats.trees.layers_on_disk import LayersOnDisk
from convert.formats.trees.locate import find_tree, home_of
from convert.formats.trees.name_map import NameMap, Place, Rule
from convert.formats.trees.scaling import scaled
from convert.formats.trees.tiles import copy
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.buffers import empty, release_unused
from llama_jax.files.page import PAGE
from llama_jax.files.scratch import scratch_file
from llama_jax.files.staging import DISK_FULL
from llama_jax.formatting import first_line, summarize

Shape = tuple[int, ...]

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_NOTABLE_PIECE = 2**28  # bytes
_SPARE = 100_000_000  # bytes of the 600 MB beside the tensors that the program leaves
_VALUES = 2**21  # read at a time, unless a piece has more
_PIECES = 2  # decoded at a time, while another is copied to where it belongs
_MAX_LAYERS = 2**16  # of a damaged shape, more are not listed


def read(
    path: Path, name_map: NameMap, *, rope: str | None = None, tokenizer: bool = True
) -> Checkpoint:
    """The Llama in an Orbax directory of another program, whose config.json is beside it.

    Args:
        rope: order of the rows of queries and keys, "halves" or "pairs", where the map does not say.
        tokenizer: whether to read it; if not, errors in it do not matter.

    Raises:
        ValueError: with every problem: no tree, no config.json, arrays without a rule, tensors without an
            array, shapes, dtypes, missing chunks, an order of rows that nobody told.
    """
    tree = require_tree(path)
    home = home_of(path, tree, ("config.json",))
    if home is None:
        raise ValueError(
            f"{path}: found no config.json, and the arrays do not tell all of it; put the model's Hugging "
            "Face config.json there"
        )
    require_inside(home, "config.json")
    config = LlamaConfig.from_pretrained(home)
    if rope is not None and name_map.rope not in (None, rope):
        raise ValueError(f"rope: found {rope}, but the map says {name_map.rope}")
    return read_tree(
        path,
        open_arrays(tree),
        home,
        config,
        name_map,
        rope=rope or name_map.rope,
        tokenizer=tokenizer,
    )


def require_tree(path: Path) -> Path:
    """The directory of the tree in `path`. Raises ValueError where there is none, or no obvious one."""
    tree = find_tree(path)
    if tree is None:
        raise ValueError(f"{path}: found no Orbax checkpoint (no _METADATA in it)")
    return tree


def read_tree(
    path: Path,
    arrays: Sequence[StoredArray],
    home: Path,
    config: LlamaConfig,
    name_map: NameMap,
    *,
    rope: str | None,
    tokenizer: bool,
    notes: Sequence[str] = (),
) -> Checkpoint:
    """The same, once the arrays, the config and the directory of the tokenizer are known."""
    sources, its_notes = _match(path, arrays, config, name_map)
    if rope is None:
        raise ValueError(
            f"{path}: the arrays do not tell the order of the rows of queries and keys, and a wrong one "
            "gives plausible losses: add --rope halves (as Hugging Face's) or --rope pairs (as Meta's, "
            "interleaved)"
        )
    # the layers of an array one after another, for they are read together
    position = {name: number for number, name in enumerate(sources)}
    specs = [
        TensorSpec(name, FLOAT_DTYPES[source.array.dtype], source.shape)
        for name, source in sorted(
            sources.items(), key=lambda item: (position[item[1].names[0]], item[1].layer or 0)
        )
    ]
    largest = max(spec.nbytes for spec in specs)
    piece = max(source.piece_bytes for source in sources.values())
    if piece > max(largest, _NOTABLE_PIECE):
        its_notes.append(
            f"an array is stored in pieces of up to {piece / 1e9:.1f} GB, which are decoded whole and take "
            "twice that memory"
        )
    stored = {source.array.name: source.array for source in sources.values()}
    return checkpoint_of(
        home,
        title=name_map.title,
        config=config,
        tensors=specs,
        load=_Reader(path, config, sources, rope, largest).load,
        stored=[_stored_tensor(array) for array in stored.values()],
        weight_files=files_of(arrays),
        files=read_companions(home, tokenizer=tokenizer),
        notes=[*notes, f"rows of queries and keys are read as {rope}", *its_notes],
    )


@dataclass(frozen=True)
class _Source:
    """Where a tensor is: an array, or one layer of it.

    names: of all tensors in the array.
    layer: None for an array that is one tensor.
    shape: of the tensor.
    extent: how much there is to read along each axis of the array, that of layers left out.
    """

    array: StoredArray
    rule: Rule
    names: tuple[str, ...]
    layer: int | None
    shape: Shape
    extent: Shape

    @property
    def axis(self) -> int | None:
        """The axis of layers."""
        return None if self.layer is None else self.rule.layer_axis

    @property
    def chunk(self) -> Shape:
        """The shape of what is decoded as one piece."""
        store = self.array.store
        chunk = store.chunk_layout.read_chunk.shape or ()
        return tuple(min(int(n or 1), size) for n, size in zip(chunk, store.shape, strict=True))

    @property
    def piece_bytes(self) -> int:
        """Bytes of what is decoded as one piece."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the array, which the tensor keeps."""
        return FLOAT_DTYPES[self.array.dtype]


def path_of(array: StoredArray) -> str:
    """The keys that lead to an array, joined by "/"."""
    return array.name.replace(".", "/")


def _stored_tensor(array: StoredArray) -> StoredTensor:
    shape = tuple(array.store.shape)
    nbytes = math.prod(shape) * FLOAT_DTYPES[array.dtype].itemsize
    return StoredTensor(array.directory, array.name, array.dtype, shape, 0, nbytes)


def _match(
    path: Path, arrays: Sequence[StoredArray], config: LlamaConfig, name_map: NameMap
) -> tuple[dict[str, _Source], list[str]]:
    """The source of every tensor of the model, in the model's order; and notes."""
    if config.num_hidden_layers > sum(max(array.store.shape, default=1) for array in arrays):
        raise ValueError(
            f"{path}: found {len(arrays)} arrays, expected some for each of "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    shapes = tensor_shapes(config)
    found: dict[str, _Source] = {}
    problems: list[str] = []
    notes: list[str] = []
    unreadable: set[str] = set()
    for array in arrays:
        key = path_of(array)
        if name_map.ignores(key):
            continue
        place = name_map.place(key)
        if place is None:
            problems.append(f"{key}: unexpected, no rule of the map is for it")
            continue
        stacked = "{layer}" in place.name
        names: tuple[str, ...] = (place.name,)
        try:
            if stacked:
                names = _layer_names(array, place)
            stored = tuple(array.store.shape)
            if stacked:
                stored = _without(stored, place.rule.layer_axis)
            _require_expected(names, shapes, found)
            _require_readable(array)
            extent = _extent(array, place.rule, names[0], stored, shapes[names[0]], config)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            unreadable.update(names)
            continue
        if extent != stored:
            extra = sum(stored) - sum(extent)
            notes.append(
                f"{key}: {extra} rows beyond the vocabulary of {config.vocab_size} are left out"
            )
        for layer, name in enumerate(names):
            found[name] = _Source(
                array, place.rule, names, layer if stacked else None, shapes[name], extent
            )
    problems += [
        f"{name}: missing, no array is mapped to it"
        for name in shapes
        if name not in found and name not in unreadable
    ]
    if problems:
        raise ValueError(summarize(str(path), problems))
    return {name: found[name] for name in shapes}, notes


def _layer_names(array: StoredArray, place: Place) -> tuple[str, ...]:
    """The tensors in an array of all layers."""
    axis, shape = place.rule.layer_axis, tuple(array.store.shape)
    if axis is None or axis >= len(shape) or not 0 < shape[axis] <= _MAX_LAYERS:
        raise ValueError(f"found shape {list(shape)}, expected layers along axis {axis}")
    return tuple(place.name.replace("{layer}", str(layer)) for layer in range(shape[axis]))


def _require_expected(
    names: Sequence[str], shapes: Mapping[str, Shape], found: Mapping[str, _Source]
) -> None:
    for name in names:
        if name not in shapes:
            tied = name == "lm_head.weight"
            raise ValueError(
                f"is mapped to {name}, which a model of this config.json does not have"
                + (": tie_word_embeddings is true; set it to false to use the head" if tied else "")
            )
        if name in found:
            raise ValueError(f"is mapped to {name}, as {path_of(found[name].array)} is")


def _require_readable(array: StoredArray) -> None:
    if array.dtype not in FLOAT_DTYPES:
        raise ValueError(f"found dtype {array.dtype}, expected {', '.join(FLOAT_DTYPES)}")
    if not array.complete:
        raise ValueError("some of its chunks are missing")


def _extent(
    array: StoredArray, rule: Rule, name: str, stored: Shape, shape: Shape, config: LlamaConfig
) -> Shape:
    """How much of an array to read: all of it, but for the rows that pad a vocabulary.

    Args:
        stored: the array's shape without the axis of layers.
        shape: of the tensor, which the rule has to give.
    """
    expected = rule.stored_shape(shape, config)
    if expected is None:
        expected = stored
    elif name in _VOCABULARY and len(expected) == len(stored) == len(shape):
        rows = (rule.transpose or (0,))[0]
        if stored[rows] > expected[rows] and _without(stored, rows) == _without(expected, rows):
            return expected
    if stored != expected:
        raise ValueError(f"found shape {list(stored)}, expected {list(expected)}")
    moved = rule.reshaped(stored, config)
    order = rule.transpose or tuple(range(len(moved)))
    if math.prod(moved) != math.prod(stored) or math.prod(stored) != math.prod(shape):
        raise ValueError(f"found shape {list(stored)}, which cannot be reshaped to {list(shape)}")
    if len(order) != len(moved):
        raise ValueError(f"found shape {list(stored)}, expected {len(order)} axes to transpose")
    return stored


def _without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


class _Reader:
    """Reads tensors. Where pieces of an array span layers, all layers are read at once.

    If memory is too small for that, they are put into a temporary file. Where there is no place for one,
    as many are read at once as memory allows, and the pieces are decoded again for the others.
    """

    def __init__(
        self,
        path: Path,
        config: LlamaConfig,
        sources: Mapping[str, _Source],
        rope: str,
        largest: int,
    ) -> None:
        """largest: bytes of the largest tensor, which says how much memory there is."""
        self._path = path
        self._config = config
        self._sources = sources
        self._pairs = rope == "pairs"
        self._largest = largest
        self._memory = 3 * largest + _SPARE  # for the tensors that are held at a time
        # of the array whose layers were read last: its name, and what returns those not loaded yet
        self._group: tuple[str, dict[int, Callable[[], np.ndarray]]] = "", {}

    def load(self, name: str) -> np.ndarray:
        """The values of a tensor.

        Raises:
            ValueError: they cannot be read.
            OSError: no space left for the layers that wait.
        """
        source = self._sources[name]
        try:
            values = self._values(source)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise  # it is the destination's
            raise ValueError(
                f"{self._path}: {path_of(source.array)}: {name}: {first_line(error)}"
            ) from None
        if self._pairs:
            values = np.ascontiguousarray(to_halves(values, rotary_heads(name, self._config)))
        return scaled(values, source.rule.factor(self._config))

    def _values(self, source: _Source) -> np.ndarray:
        if source.layer is None or source.axis is None:
            return self._read(source, 0, 1)[0]
        array, layer = source.array.name, source.layer
        if self._group[0] != array or layer not in self._group[1]:
            self._group = "", {}  # freed before the next ones are read
            self._group = array, self._layers(source, layer)
        return self._group[1].pop(layer)()

    def _layers(self, source: _Source, first: int) -> dict[int, Callable[[], np.ndarray]]:
        """What returns each layer from `first` on, or of the next ones."""
        left, fit = len(source.names) - first, self._layers_at_a_time(source)
        in_piece = min(left, source.chunk[source.axis or 0])
        if fit < in_piece and (on_disk := self._on_disk(source, first)) is not None:
            return {
                layer: partial(self._from_disk, on_disk, layer - first, source)
                for layer in range(first, len(source.names))
            }
        groups = -(-left // fit)
        size = -(-left // groups)  # groups of equal size take the least memory
        if in_piece <= fit:  # no piece is decoded for two groups
            size = min(-(-size // in_piece), fit // in_piece) * in_piece
        end = min(first + size, len(source.names))
        arrays = self._read(source, first, end)
        return {layer: partial(np.asarray, values) for layer, values in enumerate(arrays, first)}

    def _on_disk(self, source: _Source, first: int) -> LayersOnDisk | None:
        """All layers from `first` on, in a temporary file; None where there is no place for it."""
        chunk = _without(source.chunk, source.axis)
        layers = len(source.names) - first
        blocks = sum(1 for _ in _blocks(source.extent, chunk, _VALUES // len(source.names)))
        nbytes = math.prod(source.extent) * source.dtype.itemsize
        file = scratch_file(layers * (nbytes + blocks * PAGE))
        if file is None:
            return None
        on_disk = LayersOnDisk(file, source.dtype)
        for block, piece in self._pieces(source, first, len(source.names)):
            on_disk.add(block, piece)
            del piece  # before the next is read
        return on_disk

    def _from_disk(self, on_disk: LayersOnDisk, layer: int, source: _Source) -> np.ndarray:
        result = empty(source.shape, source.dtype)
        target = self._as_stored(result, source)
        on_disk.read(layer, target)
        if not np.may_share_memory(result, target):
            self._reshape_into(result, target, source)
        return result

    def _layers_at_a_time(self, source: _Source) -> int:
        if source.axis is not None and source.chunk[source.axis] == 1:
            return 1
        tensor = math.prod(source.shape) * source.dtype.itemsize
        # of the layers read before, one is being written and one has just been returned
        pieces = self._bytes_of_pieces(source, self._pieces_at_a_time(source))
        return max(1, (self._memory - 2 * tensor - pieces) // tensor)

    def _pieces_at_a_time(self, source: _Source) -> int:
        """How many pieces memory allows to decode at a time, up to the number that is of use."""
        tensor = math.prod(source.shape) * source.dtype.itemsize
        others = self._largest if source.layer is None else 2 * tensor
        left = self._memory - tensor - others
        fit = (n for n in range(_PIECES, 1, -1) if self._bytes_of_pieces(source, n) <= left)
        return next(fit, 1)

    @staticmethod
    def _bytes_of_pieces(source: _Source, decoded: int) -> int:
        """Each is held as it is stored, decoded, and copied out of TensorStore, and one more is in use."""
        return (3 * decoded + 1) * source.piece_bytes

    def _read(self, source: _Source, first: int, end: int) -> list[np.ndarray]:
        """The tensors in some layers of an array; of an array without layers, one."""
        results, targets = [], []
        for _ in range(first, end):
            results.append(empty(source.shape, source.dtype))
            targets.append(self._as_stored(results[-1], source))
        for block, piece in self._pieces(source, first, end):
            for target, values in zip(targets, piece, strict=True):
                copy(target[block], values)
            del piece, values  # before the next is read
        for result, target in zip(results, targets, strict=True):
            if not np.may_share_memory(result, target):
                self._reshape_into(result, target, source)
        return results

    def _pieces(
        self, source: _Source, first: int, end: int
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Parts of some layers, those first, and where they belong; others are decoded meanwhile."""
        chunk = _without(source.chunk, source.axis)
        # a piece is decoded with all its layers, however few are read
        layers = 1 if source.axis is None else max(end - first, source.chunk[source.axis])
        started: deque[tuple[tuple[slice, ...], Callable[[], np.ndarray]]] = deque()

        def finished() -> tuple[tuple[slice, ...], np.ndarray]:
            block, wait = started.popleft()
            piece = wait()
            return block, piece[None] if source.axis is None else np.moveaxis(piece, source.axis, 0)

        for block in _blocks(source.extent, chunk, _VALUES // layers):
            index = block
            if source.axis is not None:
                index = (*block[: source.axis], slice(first, end), *block[source.axis :])
            ready = [finished()] if len(started) == self._pieces_at_a_time(source) else []
            release_unused(self._memory - source.piece_bytes)
            started.append((block, start_reading(source.array.store[index], source.dtype)))
            while ready:
                yield ready.pop()
        while started:
            yield finished()

    def _as_stored(self, tensor: np.ndarray, source: _Source) -> np.ndarray:
        """A view of a tensor with the axes of the array; where `reshape` allows none, another array."""
        reshaped = source.rule.reshaped(source.extent, self._config)
        if reshaped != source.extent:
            return empty(source.extent, source.dtype)
        order = source.rule.transpose or tuple(range(len(reshaped)))
        moved = tensor.reshape([reshaped[axis] for axis in order])
        return moved.transpose([order.index(axis) for axis in range(len(order))])

    def _reshape_into(self, tensor: np.ndarray, values: np.ndarray, source: _Source) -> None:
        reshaped = values.reshape(source.rule.reshaped(source.extent, self._config))
        moved = reshaped.transpose(source.rule.transpose or tuple(range(reshaped.ndim)))
        copy(tensor.reshape(moved.shape), moved)


def _blocks(extent: Shape, chunk: Shape, values: int) -> Iterator[tuple[slice, ...]]:
    """The pieces that an array is stored in, as indices; small ones together, up to so many values.

    >>> [rows.stop - rows.start for rows, _ in _blocks((10, 4), (2, 4), values=16)]
    [4, 4, 2]
    """
    steps = list(chunk)
    for axis in reversed(range(len(steps))):
        together = max(1, values // math.prod(steps))
        steps[axis] = min(steps[axis] * together, extent[axis])
    return itertools.product(
        *(
            [slice(start, min(start + step, size)) for start in range(0, size, step)]
            for size, step in zip(extent, steps, strict=True)
        )
    )
