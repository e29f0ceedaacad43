"""Conversions from and to other file systems: every format, damage, kills, and the memory law."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import convert
from convert.diff import diff
from convert.formats.registry import writable
from llama_jax.files.paths import source_path
from llama_jax.files.remote import file_system, name_in, remote_path
from llama_jax.files.upload import write_bytes
from parity_tests.convert.formats.gguf.tiny_gguf import same, tiny_model
from parity_tests.convert.formats.test_flax import write_easylm, write_flax
from parity_tests.convert.test_conversion import peak_memory, random_model, weights
from parity_tests.harness.child_process import ROOT
from parity_tests.harness.object_store import memory_folder, serve_s3
from parity_tests.library.checkpoints.test_adapter import base_model, write_adapter


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with serve_s3() as url:
        yield url


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("remote") / "model"
    tiny_model().save_pretrained(directory, max_shard_size=40_000)
    return directory


def upload(directory: Path, url: str) -> str:
    """Put files where they are, without anything of the library under test."""
    path = remote_path(url)
    for file in directory.rglob("*"):
        if file.is_file():
            write_bytes(path / file.relative_to(directory).as_posix(), file.read_bytes())
    return url


def contents(url: str) -> dict[str, bytes]:
    """The files under a URL."""
    path = remote_path(url)
    store = file_system(path)
    store.invalidate_cache()
    return {
        file.removeprefix(name_in(path)): store.cat_file(file) for file in store.find(name_in(path))
    }


def place(folder: str, to: str) -> str:
    return f"{folder}/{to}" + (".gguf" if to == "gguf" else "")


@pytest.mark.parametrize("to", writable())
def test_every_format_is_written_and_read(model: Path, tmp_path: Path, to: str) -> None:
    url = place(memory_folder(), to)
    rope = "halves" if to == "maxtext" else None
    convert.convert(model, url, to=to)
    assert convert.info(url, rope=rope)["problems"] == []
    convert.convert(url, tmp_path / "back", to="hf", rope=rope)
    difference = same(weights(tmp_path / "back"), weights(model))
    # sqrt(head_dim) is no power of 2, so MaxText's queries are rounded
    assert all(to == "maxtext" and "q_proj" in name for name in difference)


@pytest.mark.parametrize("to", ["hf", "orbax", "gguf", "meta"])
def test_an_object_store_holds_what_a_disk_does(
    model: Path, tmp_path: Path, s3: str, to: str
) -> None:
    url, local = place(f"{s3}/{tmp_path.name}", to), Path(place(str(tmp_path), to))
    convert.convert(model, url, to=to)
    convert.convert(model, local, to=to)
    files = [local] if local.is_file() else [file for file in local.rglob("*") if file.is_file()]
    expected = {
        "" if file == local else f"/{file.relative_to(local).as_posix()}": file.read_bytes()
        for file in files
    }
    stored = contents(url)
    assert stored.keys() == expected.keys()
    if to != "orbax":  # which notes when it wrote
        assert stored == expected
    second = convert.convert(url, f"{s3}/{tmp_path.name}/second")
    assert str(second) == f"{s3}/{tmp_path.name}/second"
    result = diff(second, model)
    assert result.config == []
    assert result.differences == []
    assert result.same == 21
    record = f"{url}.conversion.json" if to == "gguf" else f"{url}/conversion.json"
    assert len(json.loads(contents(record)[""])["tensors"]) == 21


@pytest.mark.parametrize("write", [write_flax, write_easylm])
def test_flax(model: Path, tmp_path: Path, write) -> None:
    one_file = convert.convert(model, tmp_path / "one file")
    url = upload(write(one_file, tmp_path / "flax"), memory_folder() + "/flax")
    convert.convert(url, tmp_path / "back")
    assert same(weights(tmp_path / "back"), weights(model)) == []


def test_quantized_bin_and_sharded_sources(model: Path, tmp_path: Path) -> None:
    folder = memory_folder()
    fp8 = convert.convert(model, f"{folder}/fp8", dtype="fp8")
    local = convert.convert(model, tmp_path / "fp8", dtype="fp8")
    assert diff(fp8, local).differences == []
    shards = convert.convert(model, f"{folder}/shards", shards=3)
    assert diff(shards, model).differences == []
    assert sum(name.endswith(".safetensors") for name in contents(f"{folder}/shards")) == 3


def test_averages_and_adapters(model: Path, tmp_path: Path) -> None:
    url = upload(model, memory_folder() + "/model")
    out = convert.convert(
        url, memory_folder() + "/mean", surgery=convert.Surgery(average=[url, model])
    )
    assert diff(out, model).differences == []
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path, base, target_modules=["q_proj"])
    merged = convert.convert(tmp_path / "base", tmp_path / "merged", adapter=adapter)
    url = upload(adapter, memory_folder() + "/adapter")
    assert (
        diff(convert.convert(tmp_path / "base", tmp_path / "out", adapter=url), merged).differences
        == []
    )


def test_damage_is_found(model: Path, tmp_path: Path) -> None:
    url = memory_folder() + "/model"
    convert.convert(model, url)
    file = remote_path(url) / "model.safetensors"
    intact = contents(f"{url}/model.safetensors")[""]
    damaged = bytearray(intact)
    damaged[-1] ^= 1
    write_bytes(file, bytes(damaged))
    with pytest.raises(ValueError, match=r"its SHA-256 is not the one in conversion\.json"):
        convert.convert(url, tmp_path / "out")
    write_bytes(file, intact[:-1])
    with pytest.raises(ValueError, match="truncated"):
        convert.convert(url, tmp_path / "out")
    write_bytes(file, intact[:100])
    with pytest.raises(ValueError, match="truncated"):
        convert.convert(url, tmp_path / "out")
    (remote_path(url) / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: not found"):
        convert.convert(url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_conversion_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = memory_folder()
    with pytest.raises(ValueError, match="exists already"):
        convert.convert(model, upload(model, f"{folder}/there"))
    before = contents(folder)

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.formats.huggingface.write_safetensors", fail)
    with pytest.raises(OSError, match="No space left"):
        convert.convert(model, f"{folder}/out")
    assert contents(folder) == before


def test_destinations_that_are_refused(model: Path) -> None:
    url = upload(model, memory_folder() + "/model")
    for destination, problem in (
        (f"{url}/inside", "is inside the source"),
        (url, "exists already"),
        ("hf://owner/name", "--push"),
    ):
        with pytest.raises(ValueError, match=problem):
            convert.plan(url, destination)
    with pytest.raises(ValueError, match="not found"):
        convert.plan(f"{url}/absent", memory_folder() + "/out")


def test_a_killed_upload_is_not_complete_and_the_next_one_cleans_up(
    tmp_path: Path, s3: str
) -> None:
    source = random_model(tmp_path / "model", 24)
    folder = f"{s3}/{tmp_path.name}"
    convert.convert(source, f"{folder}/whole", shards=4)
    expected = contents(f"{folder}/whole")
    url, store = f"{folder}/out", fsspec.filesystem("s3")
    marker = f"{folder}/.out.partial"
    command = [sys.executable, "-m", "convert", str(source), url, "--to-shards", "4"]
    for uploaded in (0, 2):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            store.invalidate_cache()
            if store.exists(marker) and len(store.find(url)) >= uploaded:
                process.kill()
            time.sleep(0.002)
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(ValueError, match=r"incomplete|not found"):
            source_path(url)
        store.invalidate_cache()
        assert f"{url}/config.json" not in {f"s3://{name}" for name in store.find(url)}
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0
    store.invalidate_cache()
    assert not store.exists(marker)
    assert contents(url) == expected
    source_path(url)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "gguf", "meta", "orbax"])
def test_memory_is_three_of_the_largest_tensor(tmp_path: Path, s3: str, to: str) -> None:
    megabytes = 256
    source = random_model(tmp_path / "model", megabytes)
    url = place(f"{s3}/{tmp_path.name}", to)
    for first, second in ((source, url), (url, tmp_path / "back")):
        peak = peak_memory(first, second, "--to", to if second == url else "hf")
        assert peak <= 600e6 + 3 * megabytes * 2**20
    assert same(weights(tmp_path / "back"), weights(source)) == []
