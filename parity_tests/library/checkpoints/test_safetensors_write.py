"""Safetensors written one tensor at a time equal what the safetensors library writes."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from llama_jax.checkpoints import safetensors_write
from llama_jax.checkpoints.safetensors_write import (
    DTYPE_NAMES,
    TensorSpec,
    plan_shards,
    write_safetensors,
)


def arrays(count: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"t{i}": random.normal(size=(i + 1, 7)).astype(np.float32) for i in range(count)}


def specs_of(values: dict[str, np.ndarray]) -> list[TensorSpec]:
    return [TensorSpec(name, array.dtype, array.shape) for name, array in values.items()]


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=str)
def test_every_dtype_and_odd_shapes_round_trip(tmp_path: Path, dtype: np.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 2, 30)
    values = {
        "matrix": bits.reshape(5, 6).astype(dtype),
        "vector": bits[:3].astype(dtype),
        "scalar": np.array(1).astype(dtype),
        "empty": np.zeros((0, 4), dtype),
        "naïve.ключ": bits[:1].astype(dtype),
    }
    (path,) = write_safetensors(tmp_path, specs_of(values), values.__getitem__)
    assert path == tmp_path / "model.safetensors"
    if not dtype.name.startswith("float8"):  # the library's NumPy side has no float8
        loaded = load_file(path)
        assert loaded.keys() == values.keys()
        for name, array in values.items():
            assert loaded[name].dtype == dtype
            assert np.array_equal(loaded[name], array)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("matrix").get_dtype() == DTYPE_NAMES[dtype]
        assert file.get_slice("matrix").get_shape() == [5, 6]


def test_tensors_of_complete_pages_begin_with_a_page(tmp_path: Path) -> None:
    shapes = {"odd": (3,), "page": (1024,), "more": (5, 7), "pages": (3, 1024), "empty": (0,)}
    specs = [TensorSpec(name, np.dtype(np.float32), shape) for name, shape in shapes.items()]
    values = {name: np.full(shape, len(name), np.float32) for name, shape in shapes.items()}
    (path,) = write_safetensors(tmp_path, specs, values.__getitem__)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name in ("page", "pages"):
        assert (start + header[name]["data_offsets"][0]) % 4096 == 0
    assert list(header)[1:] == list(shapes)
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, values[name])


def test_large_checkpoints_are_written_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their data begins at a block of the disk, so that arrays there can be written from where they are."""
    monkeypatch.setattr(safetensors_write, "fits_page_cache", lambda nbytes: False)
    values = arrays() | {"large": np.arange(2**21, dtype=np.float32)}
    paths = write_safetensors(tmp_path, specs_of(values), values.__getitem__, max_shard_size=2**20)
    loaded = {name: array for path in paths[:-1] for name, array in load_file(path).items()}
    assert loaded.keys() == values.keys()
    for name, array in values.items():
        np.testing.assert_array_equal(loaded[name], array)
    for path in paths[:-1]:
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0


def test_views_are_written_in_their_own_order(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    values = {
        "t": base.T,
        "s": base[::2, ::3],
        "v": base[0, ::2],
        "b": base.astype(ml_dtypes.bfloat16).T,
    }
    (path,) = write_safetensors(tmp_path, specs_of(values), values.__getitem__)
    loaded = load_file(path)
    assert all(np.array_equal(loaded[name], array) for name, array in values.items())


def test_shards_with_an_index(tmp_path: Path) -> None:
    values = arrays()
    paths = write_safetensors(tmp_path, specs_of(values), values.__getitem__, max_shard_size=200)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [p.name for p in paths] == [*names, "model.safetensors.index.json"]
    index = json.loads(paths[-1].read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in values.values())
    for name, array in values.items():
        assert np.array_equal(load_file(tmp_path / index["weight_map"][name])[name], array)
    assert list(plan_shards(specs_of(values), 1)) == [
        f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)
    ]


def test_tensors_are_requested_once_in_order_and_progress_adds_up(tmp_path: Path) -> None:
    values = arrays()
    requested: list[str] = []
    written: list[int] = []

    def load(name: str) -> np.ndarray:
        requested.append(name)
        return values[name]

    write_safetensors(tmp_path, specs_of(values), load, max_shard_size=200, progress=written.append)
    assert requested == list(values)
    assert sum(written) == sum(a.nbytes for a in values.values())


def test_files_of_an_earlier_save_are_removed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other-model.safetensors").write_text("not ours")
    values = arrays()
    write_safetensors(tmp_path, specs_of(values), values.__getitem__, max_shard_size=200)
    write_safetensors(tmp_path, specs_of(values), values.__getitem__)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "other-model.safetensors",
    ]


def test_a_failure_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    values = arrays()
    write_safetensors(tmp_path, specs_of(values), values.__getitem__)
    before = (tmp_path / "model.safetensors").read_bytes()

    def load(name: str) -> np.ndarray:
        if name == "t3":
            raise KeyboardInterrupt
        return values[name] + 1

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path, specs_of(values), load, max_shard_size=200)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((2, 3), np.float32),
            r"tensor x: found float32\[2, 3\], expected float32\[3, 2\]",
        ),
        (
            np.zeros((3, 2), np.float16),
            r"tensor x: found float16\[3, 2\], expected float32\[3, 2\]",
        ),
    ],
)
def test_values_must_match_their_spec(tmp_path: Path, array: np.ndarray, message: str) -> None:
    spec = TensorSpec("x", np.dtype(np.float32), (3, 2))
    assert (spec.size, spec.nbytes) == (6, 24)
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path, [spec], lambda _: array)
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_reported_before_writing(tmp_path: Path) -> None:
    good = TensorSpec("x", np.dtype(np.float32), (1,))
    bad = TensorSpec("y", np.dtype(np.complex128), (1,))
    with pytest.raises(
        ValueError, match=r"'x' is duplicate.*y: safetensors has no dtype complex128"
    ):
        write_safetensors(tmp_path, [good, good, bad], lambda _: np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="max_shard_size: found 0"):
        plan_shards([good], 0)
    assert list(tmp_path.iterdir()) == []
