"""The registry of formats: what is in it, and how little a new one needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

import convert
from convert.checkpoint import DTYPES, Checkpoint
from convert.formats import plain
from convert.formats.registry import FORMATS, Entry, Format, Reader, recognize, writable
from llama_jax.checkpoints.safetensors_write import TensorSpec
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model

READING = [name for name in vars(Reader) if not name.startswith("_")]
WRITING = [name for name in vars(Format) if not name.startswith("_")]


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_provides_all_functions(name: str) -> None:
    assert (len(READING), len(WRITING)) == (2, 5)
    functions = READING + (WRITING if name in writable() else [])
    assert all(callable(getattr(FORMATS[name].reader, function)) for function in functions)
    assert set(FORMATS[name].dtypes) <= {*DTYPES, "q8_0", "fp8"}


def npz_format() -> ModuleType:
    """A new format: one .npz file with the config as an array of bytes."""
    module = ModuleType("npz")
    module.target_specs = plain.target_specs
    module.cast_rule = plain.cast_rule
    module.stored_bytes = plain.stored_bytes
    module.losses = plain.losses

    def recognizes(path: Path) -> bool:
        return path.suffix == ".npz"

    def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
        with np.load(path) as arrays:
            tensors = {name: arrays[name] for name in arrays.files}
        config = json.loads(tensors.pop("config").tobytes())
        specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
        return Checkpoint("NPZ", config, tuple(specs), tensors.__getitem__, "float32")

    def write(checkpoint: Checkpoint, path: Path, progress: Callable[[int], None]) -> None:
        tensors = {spec.name: checkpoint.load(spec.name) for spec in checkpoint.tensors}
        config = np.frombuffer(json.dumps(checkpoint.config).encode(), np.uint8)
        np.savez(path, config=config, **tensors)
        progress(sum(array.nbytes for array in tensors.values()))

    module.recognizes, module.read, module.write = recognizes, read, write
    return module


def test_a_new_format_converts_to_and_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "npz", npz_format())
    monkeypatch.setitem(FORMATS, "npz", Entry("NPZ", "an .npz file", ("float32",), "npz"))
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    file = convert.convert(tmp_path / "model", tmp_path / "m.npz", to="npz")
    assert recognize(file).title == "NPZ"
    assert convert.info(file)["problems"] == []
    assert convert.info(file)["digests"] == 21
    back = convert.convert(file, tmp_path / "back")
    original = load_file(tmp_path / "model/model.safetensors")
    converted = load_file(back / "model.safetensors")
    assert converted.keys() == original.keys()
    assert all(np.array_equal(converted[name], original[name]) for name in original)


def test_a_path_in_no_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not found"):
        recognize(tmp_path / "nowhere")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ValueError, match="not a checkpoint by itself") as caught:
        recognize(tmp_path / "text.txt")
    assert all(entry.layout in str(caught.value) for entry in FORMATS.values())
