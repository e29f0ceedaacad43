"""Damaged checkpoints of every format: a one-line error or the same tensors, never a partial output."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import convert
from convert.formats.registry import writable
from convert.record import FILE
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model
from parity_tests.convert.test_conversion import slow_if_new

CASES = 100
SOURCES = [*map(slow_if_new, writable()), "hf sharded"]
_HEADROOM = 2 * 2**30  # bytes that a damaged count or length may not ask for


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every format, by the names of SOURCES."""
    root = tmp_path_factory.mktemp("sources")
    # MaxText divides queries by sqrt(head_dim), which is 4
    tiny_model(hidden_size=64).save_pretrained(root / "model")
    sources = {}
    for name in writable():
        sources[name] = root / f"{name}.gguf" if name == "gguf" else root / name
        convert.convert(root / "model", sources[name], to=name)
    sources["hf sharded"] = root / "hf sharded"
    convert.convert(root / "model", sources["hf sharded"], max_shard_size=20_000)
    return sources


@pytest.fixture
def little_memory() -> Iterator[None]:
    """No more address space than now and `_HEADROOM`."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + _HEADROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def copied(source: Path, folder: Path) -> Path:
    """A copy of a source, its record with it."""
    if source.is_dir():
        return Path(shutil.copytree(source, folder / source.name))
    shutil.copy(source.with_name(f"{source.name}.{FILE}"), folder)
    return Path(shutil.copy(source, folder))


def files_of(source: Path) -> list[Path]:
    """Its files; the record of the digests is damaged like any other."""
    if source.is_dir():
        return sorted(path for path in source.rglob("*") if path.is_file())
    return [source, source.with_name(f"{source.name}.{FILE}")]


def truncate(path: Path, rng: random.Random) -> str:
    """Shorten a file by a random part."""
    size = path.stat().st_size
    left = rng.choice([0, rng.randrange(max(size, 1)), max(0, size - rng.randint(1, 64))])
    with path.open("r+b") as file:
        file.truncate(left)
    return f"{path.name} cut from {size} to {left}"


def flip(path: Path, rng: random.Random) -> str:
    """Change a random bit, more often near the beginning or the end, where headers are."""
    content = bytearray(path.read_bytes())
    if not content:
        return f"{path.name} is empty"
    where = rng.randrange(len(content))
    if rng.random() < 0.5:
        where = rng.choice([min(where, rng.randrange(2048)), max(where, len(content) - 1024)])
        where = min(where, len(content) - 1)
    content[where] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name} flipped at {where} of {len(content)}"


def attempt(source: Path, out: Path) -> str | None:
    """The error of converting `source`, None where it succeeds."""
    try:
        convert.convert(source, out)
    except (ValueError, OSError) as error:
        assert not out.exists()
        assert str(source.parent) in str(error), f"names no file: {error}"
        return str(error)
    return None


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return {
        name: array
        for file in directory.glob("*.safetensors")
        for name, array in load_file(file).items()
    }


@pytest.mark.parametrize("damage", [truncate, flip])
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.usefixtures("little_memory")
def test_damage_is_an_error_or_changes_no_tensor(
    sources: dict[str, Path],
    tmp_path: Path,
    name: str,
    damage: Callable[[Path, random.Random], str],
) -> None:
    """Whatever is read is what was written, for its digests are beside it."""
    rng = random.Random(f"{name} {damage.__name__}")
    expected = tensors_of(sources["hf"])
    errors = 0
    for case in range(CASES):
        folder = tmp_path / str(case)
        folder.mkdir()
        source = copied(sources[name], folder)
        what = damage(rng.choice(files_of(source)), rng)
        error = attempt(source, folder / "out")
        errors += error is not None
        if error is None:
            tensors = tensors_of(folder / "out")
            assert tensors.keys() == expected.keys(), what
            for tensor, values in expected.items():
                assert np.array_equal(tensors[tensor].view("u4"), values.view("u4")), (what, tensor)
        assert {path.name for path in folder.iterdir()} <= {
            source.name,
            f"{source.name}.{FILE}",
            "out",
        }, what
        shutil.rmtree(folder)
    assert errors > CASES // 3


@pytest.mark.parametrize("name", SOURCES)
def test_a_truncated_weights_file_is_detected_without_digests(
    sources: dict[str, Path], tmp_path: Path, name: str
) -> None:
    rng = random.Random(name)
    for case in range(40):
        folder = tmp_path / str(case)
        folder.mkdir()
        source = copied(sources[name], folder)
        record = next(path for path in files_of(source) if path.name.endswith(FILE))
        record.unlink()
        weights = [
            path
            for path in files_of(source)
            if path.name != record.name
            and path.suffix not in (".json", ".txt", ".yaml")
            and path.stat().st_size > 0
            and "_METADATA" not in path.name
        ]
        what = truncate(rng.choice(weights), rng)
        assert attempt(source, folder / "out") is not None, what
        shutil.rmtree(folder)
