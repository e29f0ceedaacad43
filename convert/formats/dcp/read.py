"""Read torch distributed checkpoints, a tensor at a time, whatever they were sharded over."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.companions import require_inside
from convert.formats.dcp.metadata import FILE, DistributedTensor, Piece, read_metadata
from convert.formats.torch_files import STORED_DTYPES, open_torch_tensor, require_torch
from convert.formats.trainer_state import model_of
from convert.renaming import Rename
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor
from llama_jax.files.buffers import empty
from llama_jax.formatting import summarize

_STEP = re.compile(r"step-(\d+)")  # torchtitan's
_ACCELERATE = "pytorch_model_fsdp_0"


def recognizes(path: Path) -> bool:
    """Whether it looks like one, or like torchtitan's or Accelerate's directory of some."""
    return path.is_dir() and _locate(path) is not None


def read(path: Path, *, tokenizer: bool = True, rename: Rename | None = None) -> Checkpoint:
    """The Llama in a distributed checkpoint; of a directory with several steps, the newest.

    Only `.metadata` is read: nothing of the optimizer or of other state is, and no number before `load`.

    Args:
        tokenizer: whether to read the one beside config.json; if not, errors in it do not matter.
        rename: what is done to the stored names first.

    Raises:
        ValueError: with every problem: missing or short files, tensors that are missing, unexpected or
            misshapen, a pickle that asks for more than torch writes, no config.json beside it, and torch
            not installed.
    """
    require_torch()
    directory = _locate(path)
    assert directory is not None
    require_inside(directory, FILE)
    tensors = read_metadata(directory)
    files = _files(directory, tensors)
    reader = _Reader(directory, tensors)
    return model_of(
        directory,
        title="torch distributed" + ("" if directory == path else f", {directory.name}"),
        homes=list(dict.fromkeys((directory, path, directory.parent))),
        stored={name: reader.stored(name) for name in tensors},
        load=reader.load,
        weight_files=files,
        tokenizer=tokenizer,
        rename=rename,
    )


def _locate(path: Path) -> Path | None:
    """The directory that has `.metadata`."""
    steps = {
        int(match[1]): child
        for child in path.iterdir()
        if (match := _STEP.fullmatch(child.name)) and (child / FILE).is_file()
    }
    candidates = [path, path / _ACCELERATE, *([steps[max(steps)]] if steps else [])]
    return next((each for each in candidates if (each / FILE).is_file()), None)


def _files(directory: Path, tensors: Mapping[str, DistributedTensor]) -> list[Path]:
    """The files of all pieces; raises ValueError for those that are missing or too short."""
    ends: dict[str, int] = {}
    for tensor in tensors.values():
        for piece in tensor.pieces:
            ends[piece.file] = max(ends.get(piece.file, 0), piece.start + piece.size)
    problems = []
    for name, end in sorted(ends.items()):
        require_inside(directory, name)
        file = directory / name
        if not file.is_file():
            problems.append(f"{name}: not found, though {FILE} names it")
        elif file.stat().st_size < end:
            problems.append(f"{name}: {file.stat().st_size} bytes, expected {end}: cut short")
    if problems:
        raise ValueError(summarize(str(directory), problems))
    return [directory / name for name in ends]


@dataclass(frozen=True)
class _Reader:
    """Puts tensors together from their pieces."""

    directory: Path
    tensors: Mapping[str, DistributedTensor]

    def stored(self, name: str) -> StoredTensor:
        tensor = self.tensors[name]
        dtype = STORED_DTYPES.get(tensor.dtype, tensor.dtype)
        size = FLOAT_DTYPES[dtype].itemsize if dtype in FLOAT_DTYPES else 1
        file, start = (
            (tensor.pieces[0].file, tensor.pieces[0].start) if tensor.pieces else (FILE, 0)
        )
        nbytes = math.prod(tensor.shape) * size
        return StoredTensor(self.directory / file, name, dtype, tensor.shape, start, nbytes)

    def load(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        if len(tensor.pieces) == 1:
            return self._piece(name, tensor, tensor.pieces[0])
        values = empty(tensor.shape, FLOAT_DTYPES[STORED_DTYPES[tensor.dtype]])
        for piece in tensor.pieces:
            place = tuple(
                slice(begin, begin + n) for begin, n in zip(piece.offsets, piece.shape, strict=True)
            )
            self._piece(name, tensor, piece, values[place])
        return values

    def _piece(
        self, name: str, tensor: DistributedTensor, piece: Piece, out: np.ndarray | None = None
    ) -> np.ndarray:
        file = self.directory / piece.file
        try:
            opened = open_torch_tensor(file, name, piece.start, piece.size)
        except ValueError as error:
            raise ValueError(f"{self.directory}: tensor {name}: {error}") from None
        stored = opened.tensors[name]
        dtype = STORED_DTYPES[tensor.dtype]
        if (stored.dtype, stored.shape) != (dtype, piece.shape):
            raise ValueError(
                f"{file}: tensor {name}: holds {stored.dtype}{list(stored.shape)}, expected "
                f"{dtype}{list(piece.shape)}"
            )
        values: np.ndarray = opened.load(name, out=out)
        return values
