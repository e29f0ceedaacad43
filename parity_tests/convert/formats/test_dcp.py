"""torch distributed checkpoints: what torch itself writes is read, what is written torch reads."""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import random
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import convert
from convert.formats.dcp.metadata import read_metadata
from parity_tests.convert.formats.gguf.tiny_gguf import same, tiny_model
from parity_tests.convert.formats.meta.tiny_meta import meta_params
from parity_tests.convert.formats.tiny_dcp import (
    Tensors,
    save,
    sharded_commands,
    titan_tensors,
    trained,
)
from parity_tests.convert.test_damage import flip, truncate


def converted(source: Path, out: Path) -> Tensors:
    return load_file(convert.convert(source, out) / "model.safetensors")


def expected(model: Any) -> Tensors:
    tied = model.config.tie_word_embeddings
    return {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("version", ["0.3", "0.2"])
def test_torchtitans_steps(tmp_path: Path, version: str, tied: bool) -> None:
    """With optimizer, dataloader and scheduler, of which nothing is read; the newest step is."""
    model = tiny_model(tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path / "run")
    tensors = titan_tensors(model, version=version)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save(other, tmp_path / "run/step-9")
    save(trained(tensors), tmp_path / "run/step-10")
    assert same(converted(tmp_path / "run", tmp_path / "a"), expected(model)) == []
    assert same(converted(tmp_path / "run/step-10", tmp_path / "b"), expected(model)) == []
    info = convert.info(tmp_path / "run")
    assert info["format"] == "torch distributed, step-10, torchtitan names"
    assert info["problems"] == []


WRAPPERS: dict[str, Callable[[Tensors], dict[str, Any]]] = {
    "bare": lambda t: dict(t),
    "model": lambda t: {"model": t, "optim": {"state": {k: {"step": v} for k, v in t.items()}}},
    "app": lambda t: {"app": {"model": t, "optim": {k: v + 1 for k, v in t.items()} and {}}},
    "FSDP": lambda t: {
        f"_fsdp_wrapped_module.{k.replace('.mlp.', '.mlp._checkpoint_wrapped_module.')}": v
        for k, v in t.items()
    },
    "compiled": lambda t: {"state": {f"_orig_mod.{k}": v for k, v in t.items()}},
}


@pytest.mark.parametrize("wrap", list(WRAPPERS))
def test_hugging_face_names_in_any_tree(tmp_path: Path, wrap: str) -> None:
    model = tiny_model(tie_word_embeddings=wrap == "model").to(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    source = save(WRAPPERS[wrap](model.state_dict()), tmp_path / "pytorch_model_fsdp_0")
    assert same(converted(source, tmp_path / "out"), expected(model)) == []
    assert convert.info(tmp_path)["format"].startswith("torch distributed, pytorch_model_fsdp_0")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_by_several_processes(tmp_path: Path, size: int) -> None:
    """Along rows, columns, both, and one within the other; some sizes are not divisible."""
    model = tiny_model(vocab_size=97, tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path)
    commands = sharded_commands(titan_tensors(model), tmp_path, tmp_path / "sharded", size)
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=300) for process in processes] == [0] * size
    pieces = [len(tensor.pieces) for tensor in read_metadata(tmp_path / "sharded").values()]
    assert max(pieces) == size
    assert same(converted(tmp_path / "sharded", tmp_path / "out"), expected(model)) == []


@pytest.mark.parametrize("single_file", [False, True])
def test_torch_reads_what_is_written(tmp_path: Path, single_file: bool) -> None:
    """Into torchtitan's state dict, and into one file; of torch's own, both layouts of files are read."""
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    out = convert.convert(tmp_path / "model", tmp_path / "dcp", to="dcp")
    tensors = titan_tensors(model)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, checkpoint_id=out, no_dist=True)
        dcp_to_torch_save(out, tmp_path / "all.pt")
    assert same(loaded, tensors) == []
    assert same(torch.load(tmp_path / "all.pt"), tensors) == []
    again = save(loaded, tmp_path / "again", single_file_per_rank=single_file)
    (again / "config.json").write_bytes((out / "config.json").read_bytes())
    assert same(converted(again, tmp_path / "back"), expected(model)) == []


def test_metas_params_in_place_of_config_json(tmp_path: Path) -> None:
    model = tiny_model(intermediate_size=96, tie_word_embeddings=True)
    source = save(titan_tensors(model), tmp_path / "dcp")
    with pytest.raises(ValueError, match=r"dcp/config\.json: not found; .* params\.json, there"):
        convert.plan(source, tmp_path / "out")
    (source / "params.json").write_text(json.dumps(meta_params(model)))
    assert same(converted(source, tmp_path / "out"), expected(model)) == []
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = tiny_model(tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path)
    return save(trained(titan_tensors(model)), tmp_path / "dcp")


def error(source: Path, out: Path) -> str:
    with pytest.raises(ValueError) as caught:
        convert.convert(source, out)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    assert not out.exists()
    return message


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_a_pickled_class_in_the_metadata(source: Path, tmp_path: Path) -> None:
    file = source / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    evil = Evil(os.mkdir, str(tmp_path / "was here"))
    metadata.planner_data = evil
    file.write_bytes(pickle.dumps(metadata))
    assert "refused: the pickle asks for posix.mkdir" in error(source, tmp_path / "out")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps(evil, protocol))
        assert "refused" in error(source, tmp_path / "out")
    for command in ("getattr", "eval", "__import__"):
        file.write_bytes(f"cbuiltins\n{command}\n(S'x'\ntR.".encode())
        assert f".{command}" in error(source, tmp_path / "out")
    encoding = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    for target in (b"ctorch\nSize\n", b"ctorch\nfloat32\n", encoding + b"S'x'\n\x85R"):
        file.write_bytes(b"cbuiltins\ngetattr\n(" + target + b"S'__globals__'\ntR.")
        assert "getattr of something other" in error(source, tmp_path / "out")
    assert not (tmp_path / "was here").exists()


def test_enumerations_by_any_python(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first versions of Python 3.11 pickle members as `getattr(class, name)`, not `class(value)`."""
    metadata = pickle.loads((source / ".metadata").read_bytes())
    for number, reduced in enumerate(
        (
            lambda self, _: (getattr, (type(self), self.name)),
            lambda self, _: (type(self), (self.value,)),
        )
    ):
        monkeypatch.setattr(enum.Enum, "__reduce_ex__", reduced)
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
        assert (b"getattr" in (source / ".metadata").read_bytes()) == (number == 0)
        convert.convert(source, tmp_path / str(number))


def test_a_pickled_class_in_a_piece(source: Path, tmp_path: Path) -> None:
    file = source / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    content = io.BytesIO()
    torch.save(Evil(os.mkdir, str(tmp_path / "was here")), content)
    (source / "evil.distcp").write_bytes(content.getvalue())
    index = next(i for i in metadata.storage_data if i.fqn == "norm.weight")
    info = metadata.storage_data[index]
    info.relative_path, info.offset, info.length = "evil.distcp", 0, len(content.getvalue())
    file.write_bytes(pickle.dumps(metadata))
    message = error(source, tmp_path / "out")
    assert "tensor norm.weight: evil.distcp: refused: the pickle asks for posix.mkdir" in message
    assert not (tmp_path / "was here").exists()


def edited(source: Path, edit: Callable[[Any], None]) -> None:
    file = source / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def test_the_classes_of_earlier_versions(source: Path, tmp_path: Path) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    def rewrite(metadata: Any) -> None:
        for entry in metadata.state_dict_metadata.values():
            if hasattr(entry, "properties"):
                entry.properties = TensorProperties(dtype=entry.properties.dtype)

    expected = read_metadata(source)
    edited(source, rewrite)
    assert b"_shard.sharded_tensor" in (source / ".metadata").read_bytes()
    assert read_metadata(source) == expected


def test_refusals(source: Path, tmp_path: Path) -> None:
    original = (source / ".metadata").read_bytes()
    out = tmp_path / "out"
    norm = "norm.weight"

    def after(edit: Callable[[Any], None]) -> str:
        (source / ".metadata").write_bytes(original)
        edited(source, edit)
        return error(source, out)

    def entry(metadata: Any) -> Any:
        return metadata.state_dict_metadata[norm]

    def info(metadata: Any) -> Any:
        return next(v for i, v in metadata.storage_data.items() if i.fqn == norm)

    def add(metadata: Any, name: str) -> None:
        metadata.state_dict_metadata[name] = entry(metadata)
        metadata.storage_data[dcp.metadata.MetadataIndex(name, [0])] = info(metadata)

    def half(metadata: Any) -> None:
        entry(metadata).chunks[0].sizes = torch.Size([3])

    def overlap(metadata: Any) -> None:
        tensor = metadata.state_dict_metadata["layers.0.attention.wo.weight"]
        chunk = tensor.chunks[0]
        rows, columns = chunk.sizes
        first = type(chunk)(torch.Size([0, 0]), torch.Size([rows - 1, columns]))
        tensor.chunks = [first, type(chunk)(torch.Size([rows - 2, 0]), torch.Size([1, columns]))]
        place = next(v for i, v in metadata.storage_data.items() if "0.attention.wo" in i.fqn)
        index = dcp.metadata.MetadataIndex("layers.0.attention.wo.weight", [rows - 2, 0])
        metadata.storage_data[index] = place

    assert f"{norm}: its 1 pieces hold 3 values, expected all" in after(half)
    assert "overlaps another" in after(overlap)
    assert "found dtype int32" in after(
        lambda m: setattr(entry(m).properties, "dtype", torch.int32)
    )
    assert "a file of the directory" in after(
        lambda m: setattr(info(m), "relative_path", "../__0_0.distcp")
    )
    assert "nowhere.distcp: not found" in after(
        lambda m: setattr(info(m), "relative_path", "nowhere.distcp")
    )
    assert "cut short" in after(lambda m: setattr(info(m), "length", 99999999))
    assert "stream.zstd, which is not supported" in after(
        lambda m: setattr(info(m), "transform_descriptors", ["stream.zstd"])
    )
    missing = after(lambda m: m.state_dict_metadata.pop("layers.1.feed_forward.w2.weight"))
    assert "model.layers.1.mlp.down_proj.weight: missing" in missing
    more = after(lambda m: add(m, "layers.0.moe.weight"))
    assert "layers.0.moe.weight: unexpected" in more
    both = after(lambda m: add(m, "output.weight"))
    assert "output.weight: another tensor is lm_head.weight too" in both
    twice = after(lambda m: add(m, "ema.tok_embeddings.weight"))
    assert "holds 2 models, ema.tok_embeddings.weight, tok_embeddings.weight" in twice
    none = after(lambda m: m.state_dict_metadata.pop("tok_embeddings.weight"))
    assert "holds no Llama: expected tok_embeddings.weight" in none
    assert "damaged, cut short" in after(lambda m: setattr(m, "state_dict_metadata", 5))
    (source / ".metadata").rename(source / ".metadata.tmp")
    assert "without its .metadata, which is written last" in error(source, out)


def test_a_flipped_number_is_found_without_digests(source: Path, tmp_path: Path) -> None:
    """torch's own reader passes it on."""
    (place,) = read_metadata(source)["norm.weight"].pieces
    file = source / place.file
    content = bytearray(file.read_bytes())
    tensor = torch.load(io.BytesIO(content[place.start : place.start + place.size]))
    at = content.index(tensor.numpy().tobytes(), place.start)
    content[at] ^= 1
    file.write_bytes(content)
    assert "tensor norm.weight: its bytes have CRC-32" in error(source, tmp_path / "out")


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_metadata_is_an_error_or_changes_no_tensor(
    source: Path, tmp_path: Path, damage: Callable[[Path, random.Random], str]
) -> None:
    file = source / ".metadata"
    content, rng = file.read_bytes(), random.Random(0)
    whole = read_metadata(source)
    errors = 0
    for _ in range(400):
        file.write_bytes(content)
        what = damage(file, rng)
        try:
            tensors = read_metadata(source)
        except ValueError as caught:
            errors += 1
            assert str(file) in str(caught), what
            assert "\n" not in str(caught), what
        else:
            for name in tensors.keys() & whole.keys():
                assert len(tensors[name].shape) == len(whole[name].shape), what
    assert errors > 100
