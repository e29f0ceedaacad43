"""Mistakes of users and damage on disk: one line that names file, tensor and reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
from convert import record
from convert.formats.registry import writable
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model
from parity_tests.harness.child_process import ROOT
from parity_tests.reference.tolerances import ROUNDING_RATIO

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "model"
    tiny_model().save_pretrained(directory)
    return directory


@pytest.fixture
def source(saved_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    tiny_model().save_pretrained(directory, max_shard_size="20KB")
    return directory


def error_of(source: Path, **options: Any) -> str:
    """The one line that `convert` raises; nothing is left behind."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(ValueError) as caught:
        convert.convert(source, source.parent / "out", **options)
    assert sorted(source.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a directory of one file in place."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b", ".."])
def test_an_index_cannot_leave_the_directory(sharded: Path, file: str) -> None:
    index = sharded / "model.safetensors.index.json"
    edit(index, lambda value: value["weight_map"].update({EMBEDDING: file}))
    assert f"tensor {EMBEDDING} is said to be in {file!r}" in error_of(sharded)


def test_an_index_of_a_missing_file(sharded: Path) -> None:
    name = sorted(sharded.glob("model-*.safetensors"))[1].name
    (sharded / name).unlink()
    assert f"{name}: cannot be read (No such file" in error_of(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_links_cannot_leave_the_directory(source: Path, tmp_path: Path, name: str) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    (source / name).rename(aside / name)
    (source / name).symlink_to(aside / name)
    assert f"{source / name}: a link to {aside / name}, expected it to stay" in error_of(source)


def test_the_cache_of_huggingface_hub_is_read(source: Path, tmp_path: Path) -> None:
    """Its snapshots are links to blobs of the same repository."""
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        file.rename(blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    convert.convert(snapshot, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EMBEDDING), f"{EMBEDDING}: missing"),
        (lambda t: t.update(stranger=torch.ones(3)), "stranger: unexpected"),
        (
            lambda t: t.update({EMBEDDING: torch.ones(40, 31)}),
            "found shape [40, 31], expected [40, 32]",
        ),
        (lambda t: t.update({EMBEDDING: torch.ones(40, 32).int()}), "found dtype I32"),
        (
            lambda t: t[EMBEDDING].view(-1)[7:9].fill_(torch.nan),
            f"tensor {EMBEDDING}: 2 values are NaN",
        ),
        (
            lambda t: t[EMBEDDING].view(-1)[0].fill_(-torch.inf),
            f"tensor {EMBEDDING}: 1 values are NaN",
        ),
    ],
)
def test_wrong_tensors(source: Path, change: Callable[..., object], message: str) -> None:
    change_tensors(source, change)
    error = error_of(source)
    assert message in error
    assert str(source) in error


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = sorted(load_file(second))[0]
    save_file({**tensors, name: load_file(second)[name]}, first)
    error = error_of(sharded)
    assert f"{name}: in {first.name} and in {second.name}" in error


def test_values_changed_after_they_were_recorded(source: Path, tmp_path: Path) -> None:
    convert.convert(source, tmp_path / "kept")
    shutil.rmtree(source)
    change_tensors(tmp_path / "kept", lambda t: t["model.norm.weight"].neg_())
    error = error_of(tmp_path / "kept")
    assert "tensor model.norm.weight: its SHA-256 is not the one in" in error
    (tmp_path / "kept" / record.FILE).unlink()
    convert.convert(tmp_path / "kept", tmp_path / "out")


def test_a_record_of_other_tensors(source: Path, tmp_path: Path) -> None:
    (source / record.FILE).write_text(json.dumps({"tensors": {"x": {"sha256": "0" * 64}}}))
    assert "does not have the tensors of the weights beside it" in error_of(source)
    (source / record.FILE).write_text("[]")
    assert "found a JSON list, expected an object" in error_of(source)


def test_the_proof_detects_swapped_tensors(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof can fail: a writer that swaps the two norms of a layer, whose shapes are the same."""
    from convert.formats import huggingface

    names = {
        f"model.layers.0.{one}_layernorm.weight": f"model.layers.0.{other}_layernorm.weight"
        for one, other in (("input", "post_attention"), ("post_attention", "input"))
    }
    write = huggingface.write_safetensors

    def swapped(directory: Path, specs: Any, load: Any, **options: Any) -> Any:
        return write(directory, specs, lambda name: load(names.get(name, name)), **options)

    monkeypatch.setattr(huggingface, "write_safetensors", swapped)
    assert "was read back with different values than were written" in error_of(source)
    convert.convert(source, tmp_path / "out", verify=False)


def test_the_proof_detects_another_config(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert.formats import directory

    def forgetful(path: Path, text: str) -> None:
        config = {**json.loads(text), "rope_parameters": None, "rope_theta": 500000.0}
        path.write_text(json.dumps(config))

    monkeypatch.setattr(directory, "write_text", forgetful)
    assert "was read back with rope_parameters" in error_of(source)


@pytest.mark.parametrize("to", writable())
def test_the_destination_must_be_new_and_outside_the_source(
    source: Path, tmp_path: Path, to: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    for destination, message in (
        (tmp_path / "taken", "exists already"),
        (source / "inside", "is inside the source"),
        (tmp_path / "no/where", "no such directory; create it first"),
        (tmp_path / "file/inside", "file: not a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.convert(source, destination, to=to)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(ValueError, match="is inside the source"):
        convert.convert(source, link / "inside", to=to)


def test_a_directory_without_write_permission(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert "no permission to write there" in error_of(source)


@pytest.mark.parametrize("to", writable())
def test_a_disk_that_fills_up(source: Path, tmp_path: Path, to: str) -> None:
    """Files may not grow beyond a limit: what is written stops there, as on a full disk."""
    import subprocess
    import sys

    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from convert.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(out), "--to", to],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unreadable_tokenizer_json(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a tokenizer" in error_of(source)
    convert.convert(source, tmp_path / "out", tokenizer=False)
    assert not (tmp_path / "out/tokenizer.json").exists()


def test_info_lists_problems_beside_the_config(source: Path) -> None:
    change_tensors(source, lambda t: t.pop(EMBEDDING))
    facts = convert.info(source)
    assert facts["config"]["hidden_size"] == 32
    assert f"{EMBEDDING}: missing" in facts["problems"][0]


def test_info_of_a_tokenizer(source: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(source / "tokenizer.json")
    )
    (source / "tokenizer_config.json").write_text('{"bos_token": {"content": "b"}}')
    facts = convert.info(source)
    assert facts["tokenizer"] == {
        "model": "WordLevel",
        "tokens": 2,
        "bos_token": "b",
        "chat_template": False,
    }
    assert facts["problems"] == []
    (source / "tokenizer_config.json").write_text("{}")
    (source / "special_tokens_map.json").write_text('{"eos_token": "b"}')
    (source / "chat_template.json").write_text('{"chat_template": "x"}')
    facts = convert.info(source)["tokenizer"]
    assert (facts["eos_token"], facts["chat_template"]) == ("b", True)
    (source / "special_tokens_map.json").write_text('{"eos_token": 5}')
    assert "special_tokens_map.json: eos_token: found 5" in convert.info(source)["problems"][0]


def test_unknown_dtypes_and_formats(source: Path) -> None:
    assert "to: found 'onnx', expected one of hf, orbax" in error_of(source, to="onnx")
    assert "dtype: found 'int4', expected one of float32" in error_of(source, dtype="int4")
    assert "dtype: found 'q8_0'" in error_of(source, dtype="q8_0")
    assert "max_shard_size is for Hugging Face only" in error_of(
        source, to="orbax", max_shard_size=7
    )


def test_verification_needs_memory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.verify_logits.available_memory", lambda: 1000)
    assert "--verify: 1000 bytes of memory are free" in error_of(source, logits=True)


def test_logits_are_compared(source: Path, tmp_path: Path) -> None:
    todo = convert.plan(source, tmp_path / "out", to="orbax", logits=True)
    comparison = convert.run(todo).logits
    assert comparison is not None
    assert comparison.tokens == 64
    assert 0 < comparison.ours <= ROUNDING_RATIO * comparison.torch
    facts = json.loads((tmp_path / "out" / record.FILE).read_text())
    assert facts["logits"]["tokens"] == 64


def test_logits_that_differ_are_an_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: weights that are a little other than PyTorch's."""
    from convert import verify_logits

    monkeypatch.setattr(
        verify_logits._Tensors,
        "__getitem__",
        lambda self, name: np.asarray(self.checkpoint.load(name)) * np.float32(1.0001),
    )
    assert "the logits of the output are" in error_of(source, logits=True)
