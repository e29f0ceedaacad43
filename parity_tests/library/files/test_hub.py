"""Names on the Hub, against a hub of our own."""

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants
from tokenizers import Tokenizer, models

import convert
from llama_jax import LlamaConfig, LlamaForCausalLM, load_tokenizer
from llama_jax.__main__ import main
from llama_jax.files.hub import cached_path, hub_name, push
from llama_jax.load import load_config, load_model
from parity_tests.harness.child_process import ROOT
from parity_tests.harness.hub import TOKEN, Hub, serve
from train.options import ModelOptions, RunOptions, with_absolute_paths

NAME = "owner/tiny"
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    model.save_pretrained(directory, max_shard_size=4000)
    Tokenizer(models.WordLevel({"?": 0}, unk_token="?")).save(str(directory / "tokenizer.json"))
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the checkpoint; the cache is empty, and this directory as well."""
    with serve() as served:
        served.repositories[NAME] = files_of(checkpoint) | {
            "README.md": b"not needed",
            "pytorch_model.bin": b"not needed",
            "consolidated.safetensors": b"not needed",
            "original/consolidated.00.pth": b"not needed",
            "onnx/model.onnx": b"not needed",
        }
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield served


def downloads(hub: Hub) -> set[str]:
    return {
        request.split("/resolve/")[1].split("/", 1)[1]
        for request in hub.requests
        if request.startswith("GET") and "/resolve/" in request
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", ("meta-llama/Llama-3.2-1B", None, None)),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1", None)),
        ("hf://a/b@v1", ("a/b", "v1", None)),
        (str(Path("hf://a/b")), ("a/b", None, None)),
        ("a/b/c.Q8_0.gguf", ("a/b", None, "c.Q8_0.gguf")),
        ("a/b@main/q8/c.gguf", ("a/b", "main", "q8/c.gguf")),
    ],
)
def test_names(text: str, expected: tuple[str, str | None, str | None]) -> None:
    assert hub_name(text) == expected


@pytest.mark.parametrize(
    "text", ["tiny", "a/b/c", "./a/b", "../a", "/a/b", "~/a", "a/b ", "a/b@", "a//b", "", "."]
)
def test_paths_are_not_names(text: str) -> None:
    assert hub_name(text) is None


def test_a_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And below an existing directory a name is that of a path, even of none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert hub_name("a/b") is None
    assert hub_name("a/absent") is None
    assert hub_name("hf://a/b") is not None


def test_only_what_is_needed_is_downloaded(hub: Hub, checkpoint: Path) -> None:
    assert load_config(NAME) == LlamaConfig.from_pretrained(checkpoint)
    assert load_tokenizer(NAME).encode("x").ids == [0]
    small = {"config.json", "tokenizer.json"}
    assert downloads(hub) == small
    model = load_model(NAME)
    weights = {file for file in files_of(checkpoint) if file.startswith("model")}
    assert len(weights) > 2
    assert downloads(hub) == small | weights
    expected = load_model(checkpoint)
    ids = jnp.arange(6)[None]
    np.testing.assert_array_equal(model(ids).logits, expected(ids).logits)
    hub.requests.clear()
    LlamaForCausalLM.from_pretrained(f"{NAME}@main")
    assert downloads(hub) == set()


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (("pytorch_model.bin", "flax_model.msgpack"), "pytorch_model.bin"),
        (("consolidated.00.pth", "flax_model.msgpack"), "consolidated.00.pth"),
        (("weights.safetensors", "x.gguf"), "weights.safetensors"),
        (("adapter_model.safetensors", "README.md"), "adapter_model.safetensors"),
        (("items/d/1", "items/manifest.ocdbt"), "items/d/1"),
    ],
)
def test_one_kind_of_weights_is_downloaded(hub: Hub, files: tuple[str, str], taken: str) -> None:
    hub.repositories[NAME] = {"config.json": b"{}"} | {f: f.encode() for f in files}
    cached_path(NAME)
    got = downloads(hub) - {"config.json"}
    assert taken in got
    assert got == {taken} or got == set(files)


def test_a_gguf_file_by_name(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    convert.convert(checkpoint, tmp_path / "tiny.gguf", tokenizer=False)
    content = (tmp_path / "tiny.gguf").read_bytes()
    hub.repositories["owner/gguf"] = {"q/tiny.F32.gguf": content, "tiny.Q2_K.gguf": b""}
    converted = convert.convert("owner/gguf/q/tiny.F32.gguf", tmp_path / "out", tokenizer=False)
    assert downloads(hub) == {"q/tiny.F32.gguf"}
    ids = jnp.arange(6)[None]
    np.testing.assert_array_equal(
        load_model(converted)(ids).logits, load_model(checkpoint)(ids).logits
    )
    with pytest.raises(ValueError, match=r"GGUF files only.*q/tiny\.F32\.gguf, tiny\.Q2_K\.gguf"):
        cached_path("owner/gguf")
    with pytest.raises(ValueError, match="has no such file"):
        cached_path("owner/gguf/absent.gguf")


def test_without_network_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cached_path(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cached_path(NAME) == before
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids") as error:
        cached_path("owner/other")
    assert "\n" not in str(error.value)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cached_path(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses connections
    assert cached_path(NAME) == before
    with pytest.raises(ValueError, match="no such directory, and the Hub cannot be reached"):
        cached_path("owner/other")


def test_refusals(hub: Hub) -> None:
    hub.repositories |= {
        "owner/gated": {"config.json": b"{}"},
        "owner/private": {},
        "owner/empty": {},
    }
    hub.gated.add("owner/gated")
    hub.private.add("owner/private")
    for name, message in (
        ("owner/absent", "neither a directory nor a repository on the Hub"),
        ("owner/private", "for a private one log in"),
        ("owner/gated", r"gated: ask for access at http.*/owner/gated, then log in"),
        (f"{NAME}@v2", "owner/tiny has no revision 'v2'"),
        ("owner/empty", "has no checkpoint"),
        ("owner/a--b", "no name on the Hub"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            cached_path(name)
        assert str(error.value).startswith(f"{name}: ")
        assert "\n" not in str(error.value)


def test_a_token_opens_gated_and_private(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(NAME)
    hub.private.add(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_config(NAME).hidden_size == CONFIG.hidden_size


def test_a_cache_that_cannot_be_written(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    assert main(["info", NAME]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device, in the Hub's cache" in error


def test_without_huggingface_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"no such directory; .*'llama-jax\[hub\]'"):
        cached_path(NAME)


def test_programs(hub: Hub, tmp_path: Path) -> None:
    """By environment variables, as a user sets them."""
    env = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, env=env | more, capture_output=True, text=True, check=False)

    info = run("convert", "info", NAME, "--json")
    assert info.returncode == 0, info.stderr
    pushed = run("convert", NAME, "out", "--no-tokenizer", "--push", "me/copy", HF_TOKEN=TOKEN)
    assert pushed.returncode == 0, pushed.stderr
    assert f"pushed: {hub.address}/me/copy" in pushed.stderr
    assert "me/copy" in hub.private
    assert hub.repositories["me/copy"].keys() >= {"config.json", "model.safetensors"}
    offline = run("convert", "info", NAME, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    refused = run("convert", NAME, "out2", "--push", "me/copy")
    assert refused.returncode == 2
    assert refused.stderr == "error: push: no token; log in with `hf auth login` or set HF_TOKEN\n"
    assert not Path("out2").exists()


def test_push(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = push(checkpoint, "me/tiny", message="First")
    assert address == f"{hub.address}/me/tiny"
    assert {
        f: c for f, c in hub.repositories["me/tiny"].items() if f != ".gitattributes"
    } == files_of(checkpoint)
    assert load_config("me/tiny").hidden_size == CONFIG.hidden_size
    for name in ("tiny", "me/tiny@main", "me/tiny/x.gguf"):
        with pytest.raises(ValueError, match=r"push: found .* expected owner/name"):
            push(checkpoint, name, message="First")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="me/tiny: the Hub refuses"):
        push(checkpoint, "me/tiny", message="First")


def test_options_of_a_run(hub: Hub) -> None:
    """run.toml names the directory of the cache, which also tells the commit."""
    model = ModelOptions(init_from=Path(NAME))
    options = with_absolute_paths(RunOptions(model=model))
    assert options.model.init_from is not None
    assert options.model.init_from.name == hub.commit(NAME)
    assert (options.model.init_from / "config.json").is_file()
