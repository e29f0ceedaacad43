"""PyTorch's files read a tensor at a time: the same values as torch's, and no harm from bad ones."""

from __future__ import annotations

import os
import pickle
import random
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.formats.torch_files import open_torch_file
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    flat = torch.randn(500)
    tensors = {f"t{i}": torch.randn(3, i + 2).to(dtype) for i, dtype in enumerate(DTYPES)}
    return tensors | {
        "view": flat[7:307].view(20, 15),
        "rest": flat[300:],
        "transposed": flat[:60].view(6, 10).t(),
        "expanded": torch.randn(4, 1).expand(4, 5),
        "steps": flat[::3],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "empty": torch.zeros(0, 3),
        "again": tensors["t1"],
    }


def saved(path: Path, tensors: Any = None, **options: Any) -> Path:
    torch.save(state_dict() if tensors is None else tensors, path, **options)
    return path


def numbers(tensor: torch.Tensor) -> np.ndarray:
    raw = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    raw = raw.view(torch.uint8).numpy()
    dtype = FLOAT_DTYPES[
        {8: "F64", 4: "F32"}.get(
            tensor.element_size(), "F16" if tensor.dtype == torch.float16 else "BF16"
        )
    ]
    return raw.view(dtype).reshape(tuple(tensor.shape))


def error_of(path: Path) -> str:
    """The one line that opening the file, or reading every tensor of it, fails with."""
    with pytest.raises(ValueError) as caught:
        read_all(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def read_all(path: Path) -> dict[str, np.ndarray]:
    file = open_torch_file(path)
    return {name: file.load(name) for name, t in file.tensors.items() if t.dtype in FLOAT_DTYPES}


@pytest.mark.parametrize("zipped", [True, False])
def test_values_equal_torchs(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    file = open_torch_file(path)
    assert file.in_memory is not zipped
    expected = torch.load(path, weights_only=True)
    assert list(file.tensors) == list(expected)
    for name, tensor in expected.items():
        values = file.load(name)
        assert file.tensors[name].shape == tuple(tensor.shape)
        assert values.flags.c_contiguous
        expected_values = numbers(tensor)
        assert (values.dtype, values.shape) == (expected_values.dtype, expected_values.shape), name
        assert values.tobytes() == expected_values.tobytes(), name
        assert (file.load(name, rows=1) == expected_values[:1]).all()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_view_of_a_storage(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    storage = torch.arange(120.0)
    shape = data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    strides = [data.draw(st.integers(0, 7)) for _ in shape]
    offset = data.draw(st.integers(0, 30))
    view = torch.as_strided(storage, shape, strides, offset)
    path = saved(tmp_path_factory.mktemp("views") / "m.bin", {"view": view})
    values = open_torch_file(path).load("view")
    assert values.shape == tuple(shape)
    assert (values == numbers(view)).all()


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "m.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(read_all(path)) == len(state_dict())


def test_only_the_tensor_being_read_is_in_memory(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {f"t{i}": torch.zeros(2**20) for i in range(20)})
    open_torch_file(path)  # what torch imports on first use is not to be counted
    tracemalloc.start()
    try:
        file = open_torch_file(path)
        for name in file.tensors:
            file.load(name)
        assert tracemalloc.get_traced_memory()[1] < 14e6  # a tensor is 4 MiB, a buffer as much
    finally:
        tracemalloc.stop()


def test_damage_inside_a_tensor_is_detected_and_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"a": torch.zeros(1000), "b": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("m/data/1")
    content[entry.header_offset + 2000] ^= 1
    path.write_bytes(content)
    assert "tensor b: its bytes have CRC-32" in error_of(path)
    assert open_torch_file(path).load("a").sum() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("zipped", [True, False])
def test_values_that_are_not_finite(tmp_path: Path, value: float, zipped: bool) -> None:
    tensors = {"a": torch.tensor([1.0, value])}
    path = saved(tmp_path / "m.bin", tensors, _use_new_zipfile_serialization=zipped)
    assert "tensor a: 1 values are NaN or infinite" in error_of(path)


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_pickle_that_wants_to_run_code(tmp_path: Path, zipped: bool, inside: bool) -> None:
    evil = Evil(os.mkdir, str(tmp_path / "was here"))
    held = {"a": torch.zeros(2), "b": evil} if inside else evil
    path = saved(tmp_path / "m.bin", held, _use_new_zipfile_serialization=zipped)
    assert "posix.mkdir" in error_of(path)
    assert not (tmp_path / "was here").exists()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(evil, protocol))
        error_of(path)
    assert not (tmp_path / "was here").exists()


def test_pickles_that_are_not_tensors_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    assert "holds a list" in error_of(saved(path, [torch.zeros(2)]))
    assert "holds a int under 'step'" in error_of(saved(path, {"step": 3}))
    assert "holds a dict under 'optimizer'" in error_of(
        saved(path, {"optimizer": {"a": torch.zeros(2)}})
    )
    assert "holds a Tensor under a int" in error_of(saved(path, {3: torch.zeros(2)}))
    sparse = {"a": torch.eye(2).to_sparse()}
    assert "sparse" in error_of(saved(path, sparse))
    meta = {"a": torch.empty(3, device="meta")}
    assert "tensor a: its numbers are not in the file" in error_of(saved(path, meta))


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    for content in (b"", b"hello", b"PK\x03\x04", b"PK\x03\x04" + bytes(100), b"\x80\x02."):
        path.write_bytes(content)
        error_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no pickle")
    assert "0 entries NAME/data.pkl, expected one" in error_of(path)
    path.unlink()
    assert "cannot be read (No such file or directory)" in error_of(path)


def test_a_zip_that_was_compressed_afterwards(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin")
    again = tmp_path / "again.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert "its entries are compressed or encrypted" in error_of(again)


def test_a_tensor_larger_than_its_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"a": torch.zeros(1).expand(2**20, 2**30)})
    assert "more than the file holds" in error_of(path)


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"torch is not installed.*'\.\[parity\]'"):
        open_torch_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_anywhere(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    rng = random.Random(0)
    cuts = [0, 1, 2, 4, len(content) - 1, *(rng.randrange(len(content)) for _ in range(200))]
    for cut in cuts:
        path.write_bytes(content[:cut])
        error_of(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_bit_flips_anywhere(tmp_path: Path, zipped: bool) -> None:
    """A flip is an error or changes nothing; where a checksum covers it, it is never a wrong value."""
    path = saved(tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    content, expected = path.read_bytes(), read_all(path)
    rng = random.Random(0)
    refused = 0
    for _ in range(250):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        tracemalloc.start()
        try:
            tensors = read_all(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            assert "m.bin" in str(error)
        else:
            if zipped:
                assert tensors.keys() == expected.keys()
                assert all(tensors[n].tobytes() == expected[n].tobytes() for n in expected)
        finally:
            assert tracemalloc.get_traced_memory()[1] < 100e6
            tracemalloc.stop()
    assert refused > 50
