"""Paths of other file systems: what is one, ranges that are read, errors, uploads that are cut."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.__main__ import main
from llama_jax.files import reading
from llama_jax.files.download import on_disk
from llama_jax.files.paths import destination_path, source_path
from llama_jax.files.reading import fill, open_file, read_bytes
from llama_jax.files.remote import file_system, is_remote, name_in, remote_path
from llama_jax.files.upload import output_directory, uploading, write_bytes
from llama_jax.load import load_model
from parity_tests.harness.object_store import Stopped, memory_folder, serve_s3, stop_after

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with serve_s3() as url:
        yield url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("memory://a/b", "memory://a/b"),
        ("memory://a/b/", "memory://a/b"),
        ("memory:/a/b", "memory://a/b"),
        ("memory:///a/b", "memory://a/b"),
        ("s3://a/b c/[d]", "s3://a/b c/[d]"),
        ("hf://datasets/owner/name/dir", "hf://datasets/owner/name/dir"),
    ],
)
def test_a_url_is_a_remote_path(text: str, url: str) -> None:
    path = remote_path(text)
    assert path is not None
    assert is_remote(path)
    assert str(path) == url
    assert str(path / "x" / "y") == f"{url}/x/y"
    assert (path / "x").parent == path
    assert remote_path(path) is path
    with pytest.raises(TypeError):  # nothing takes it for a local file
        os.fspath(path)


@pytest.mark.parametrize("text", ["a/b", "/a/b", ".", "a", "a:b", "C:\\a", "file:///tmp", "x://y"])
def test_other_text_is_a_local_path(text: str) -> None:
    assert remote_path(text) is None


def test_a_local_directory_that_looks_like_a_url_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory:").mkdir()
    assert remote_path("memory:/model") is None
    assert remote_path("memory://model") is not None
    assert destination_path("memory:/model") == tmp_path / "memory:" / "model"


def test_file_urls_are_local() -> None:
    assert source_path("file:///tmp/x") == Path("/tmp/x")
    assert source_path(Path("file:///tmp/x")) == Path("/tmp/x")
    assert destination_path("file:///tmp/x") == Path("/tmp/x")
    assert source_path(Path("local:///tmp/x")) == Path("/tmp/x")


def test_a_model_is_saved_at_a_file_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(f"file://{tmp_path}/model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert main(["info", f"file://{tmp_path}/model"]) == 0
    out = ["--out", f"file://{tmp_path}/quantized", "--group-size", "16"]
    assert main(["quantize", "--model", f"file://{tmp_path}/model", *out]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "quantized"}
    assert main(["quantize", "--model", f"file://{tmp_path}/model", *out]) == 2


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_ranges_are_those_of_the_file(
    scheme: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PIECE", 1000)
    monkeypatch.setattr(reading, "_LEAST", 300)
    monkeypatch.setattr(reading, "_MOST", 5000)
    content = np.random.default_rng(0).bytes(20_011)
    local = tmp_path / "file"
    local.write_bytes(content)
    path = remote_path(f"{s3}/ranges" if scheme == "s3" else memory_folder())
    assert path is not None
    write_bytes(path, content)
    generator = np.random.default_rng(1)
    for end in (None, 7000):
        with open_file(local) as expected, open_file(path, end) as file:
            assert file.seek(0, os.SEEK_END) == expected.seek(0, os.SEEK_END) == 20_011
            for _ in range(60):
                position, count = map(int, generator.integers(0, (21_000, 4000)))
                if generator.random() < 0.5:  # else where the last one ended
                    assert file.seek(position) == expected.seek(position)
                assert read_bytes(file, count) == read_bytes(expected, count)
                assert file.tell() == expected.tell()
            out = np.zeros(30_000, np.uint8)
            file.seek(0)
            assert fill(file, out.data) == 20_011
            assert out[:20_011].tobytes() == content


def test_a_tensor_takes_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    path = remote_path(memory_folder())
    assert path is not None
    write_bytes(path, bytes(50 << 20))
    requests = []
    cat = type(file_system(path)).cat_ranges

    def counted(self, paths, starts, ends, **options):
        requests.append(sum(ends) - sum(starts))
        return cat(self, paths, starts, ends, **options)

    monkeypatch.setattr(type(file_system(path)), "cat_ranges", counted)
    with open_file(path, 40 << 20) as file:
        assert len(read_bytes(file, 100)) == 100
        assert sum(requests) == 1 << 16
        requests.clear()
        file.seek(10 << 20)
        buffer = bytearray(4 << 20)
        for _ in range(7):
            assert fill(file, buffer) == len(buffer)
        file.seek(38 << 20)
        assert fill(file, bytearray(2 << 20)) == 2 << 20
    assert sum(requests) == 30 << 20
    assert len(requests) <= 5


def test_a_model_is_saved_and_loaded(s3: str) -> None:
    model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    model.save_pretrained(f"{s3}/model", max_shard_size=4000)
    loaded = load_model(f"{s3}/model")
    again = LlamaForCausalLM.from_pretrained(f"{s3}/model/")
    for other in (loaded, again):
        ours, theirs = (nnx.to_flat_state(nnx.state(each)) for each in (model, other))
        for (name, one), (_, two) in zip(ours, theirs, strict=True):
            assert np.array_equal(one[...], two[...]), name
    with pytest.raises(ValueError, match="exists already"):
        model.save_pretrained(f"{s3}/model")


def test_an_upload_counts_only_when_it_is_complete(tmp_path: Path) -> None:
    """Cut after every change, with no chance to clean up; then repeated."""
    for name in ("config.json", "model.safetensors", "sub/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 100)

    def save(url: str) -> None:
        with uploading(remote_path(url)) as upload:
            upload(tmp_path)

    def stored(url: str) -> dict[str, bytes]:
        path = source_path(url)
        files = file_system(path).find(name_in(path))
        return {
            name.removeprefix(name_in(path) + "/"): file_system(path).cat_file(name)
            for name in files
        }

    whole = memory_folder() + "/model"
    with stop_after(100) as changes:
        save(whole)
    assert changes.count("put_file") == 3
    expected = stored(whole)
    assert expected.keys() == {"config.json", "model.safetensors", "sub/file"}
    for count in range(len(changes)):
        url = memory_folder() + "/model"
        with stop_after(count), pytest.raises(Stopped):
            save(url)
        with pytest.raises(ValueError, match=r"incomplete|not found"):
            source_path(url)
        save(url)
        assert stored(url) == expected


def test_what_fails_is_removed() -> None:
    url = memory_folder() + "/model"

    def fail() -> None:
        with output_directory(url) as directory:
            (directory / "config.json").write_text("{}")
            raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        fail()
    parent = remote_path(url).parent
    assert not list(file_system(parent).find(name_in(parent)))


def test_config_json_is_uploaded_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("config.json", 5), ("small", 1), ("large", 99), ("a/config", 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    order = []
    store = fsspec.get_filesystem_class("memory")
    put = store.put_file

    def recorded(self, local, name, **options):
        order.append(Path(name).name)
        return put(self, local, name, **options)

    monkeypatch.setattr(store, "put_file", recorded)
    with uploading(remote_path(memory_folder() + "/model")) as upload:
        upload(tmp_path)
    assert order == ["large", "config", "small", "config.json"]


def test_another_process_that_takes_the_place_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    path = remote_path(memory_folder() + "/model")

    def two_at_once() -> None:
        with uploading(path) as first, uploading(path) as second:
            second(tmp_path)
            first(tmp_path)

    with pytest.raises(ValueError, match="another process writes there"):
        two_at_once()


def test_a_changed_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    path = remote_path(memory_folder() + "/model")
    store = type(file_system(path))
    put = store.put_file

    def flipped(self, local, name, **options):
        put(self, local, name, **options)
        content = bytearray(self.cat_file(name))
        content[500] ^= 1
        self.pipe_file(name, bytes(content))

    monkeypatch.setattr(store, "put_file", flipped)
    with (
        pytest.raises(ValueError, match="file: was read back with other bytes"),
        uploading(path) as upload,
    ):
        upload(tmp_path)
    assert not path.exists()


def test_a_copy_stays_in_its_directory() -> None:
    url = memory_folder()
    write_bytes(remote_path(url) / "a/b", b"1")
    write_bytes(remote_path(url) / "c", b"23")
    copy = on_disk(remote_path(url))
    assert (copy / "a/b").read_bytes() == b"1"
    assert (copy / "c").read_bytes() == b"23"
    assert on_disk(remote_path(url)) == copy
    write_bytes(remote_path(url) / "c", b"45")
    assert (on_disk(remote_path(url)) / "c").read_bytes() == b"45"
    assert on_disk(Path("local")) == Path("local")


def test_a_copy_that_the_disk_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    url = memory_folder()
    write_bytes(remote_path(url) / "file", bytes(100))
    usage = type("usage", (), {"free": 99})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"needs a local copy of 100 bytes.* has 99 free; set TMPDIR"
    ):
        on_disk(remote_path(url))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_mistakes_are_one_line(
    s3: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("s3://absent-bucket/model", f"{s3}/absent", "memory://absent"):
        assert f"{url}: not found" in error_of(capsys, "info", url)
    assert "fsspec knows no abc://" in error_of(capsys, "info", "abc://y")
    for module, url, advice in (
        (
            "upath",
            "memory://y",
            "universal_pathlib is not installed: pip install 'llama-jax[remote]'",
        ),
        ("upath", "s3://y", "universal_pathlib is not installed: pip install 'llama-jax[s3]'"),
        ("gcsfs", "gs://y/z", "pip install 'llama-jax[gs]'"),
        ("adlfs", "az://y/z", "adlfs"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert advice in error_of(capsys, "info", url)


def test_a_service_that_refuses_or_is_not_there_is_one_line(
    s3: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.get_filesystem_class("s3")

    async def forbidden(self, *args, **options):
        raise PermissionError("Access Denied")

    store.clear_instance_cache()
    with monkeypatch.context() as patch:
        patch.setattr(store, "_info", forbidden)
        line = error_of(capsys, "info", f"{s3}/model")
        assert "no permission (Access Denied); check the credentials for s3://" in line
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        store.clear_instance_cache()
        assert "cannot be reached (Could not connect" in error_of(capsys, "info", f"{s3}/model")
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        store.clear_instance_cache()
        assert "Unable to locate credentials" in error_of(capsys, "info", f"{s3}/model")
    store.clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://bucket", "is a bucket"),
        ("hf://owner/name", "add --push owner/name"),
        ("abc://y/z", "fsspec knows no abc://"),
    ],
)
def test_a_destination_that_cannot_be_written_is_refused(url: str, problem: str, s3: str) -> None:
    with pytest.raises(ValueError, match=problem):
        destination_path(url)
    with pytest.raises(ValueError, match=problem):
        LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(url)


def test_a_missing_bucket_is_not_created(s3: str) -> None:
    with pytest.raises(ValueError, match="s3://absent-bucket/model: not found"):
        LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0)).save_pretrained("s3://absent-bucket/model")
    assert not fsspec.filesystem("s3").exists("absent-bucket")
