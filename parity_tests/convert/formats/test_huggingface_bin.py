"""Hugging Face directories of PyTorch files: as safe and as strict as those of safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert import convert, info
from convert.formats.huggingface import read
from parity_tests.convert.formats.gguf.tiny_gguf import same, tiny_model

Tensors = dict[str, torch.Tensor]


def directory(path: Path, files: dict[str, Tensors], options: Any = None, **saving: Any) -> Path:
    """A directory with those files, and an index where they are several."""
    path.mkdir()
    tiny_model(**(options or {})).config.save_pretrained(path)
    for file, tensors in files.items():
        torch.save(tensors, path / file, **saving)
    if list(files) != ["pytorch_model.bin"]:
        files_by_name = {name: file for file, tensors in files.items() for name in tensors}
        write_index(path, files_by_name)
    return path


def write_index(path: Path, files_by_name: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": files_by_name}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def weights(**options: Any) -> Tensors:
    tensors = tiny_model(**options).state_dict()
    if options.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    return tensors


def halves(tensors: Tensors) -> dict[str, Tensors]:
    names = list(tensors)
    return {
        f"pytorch_model-0000{i + 1}-of-00002.bin": {name: tensors[name] for name in names[i::2]}
        for i in range(2)
    }


def error_of(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_the_same(
    tmp_path: Path, dtype: torch.dtype, sharded: bool, tied: bool
) -> None:
    options = {"tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True}
    tensors = {name: tensor.to(dtype) for name, tensor in weights(**options).items()}
    files = halves(tensors) if sharded else {"pytorch_model.bin": tensors}
    out = convert(directory(tmp_path / "in", files, options), tmp_path / "out")
    assert same(load_file(out / "model.safetensors"), tensors) == []


def test_a_tied_head_that_shares_the_embeddings_storage(tmp_path: Path) -> None:
    options = {"tie_word_embeddings": True}
    tensors = tiny_model(**options).state_dict()
    assert "lm_head.weight" in tensors
    source = directory(tmp_path / "in", {"pytorch_model.bin": tensors}, options)
    assert "a copy of the embedding, is left out" in info(source)["notes"][0]
    other = tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}
    torch.save(other, source / "pytorch_model.bin")
    assert "lm_head.weight: differs from the embedding" in error_of(source)


def test_a_file_from_before_torch_1_6(tmp_path: Path) -> None:
    files = {"pytorch_model.bin": weights()}
    saving = {"_use_new_zipfile_serialization": False}
    source = directory(tmp_path / "in", files, **saving)
    assert info(source)["notes"] == [
        "pytorch_model.bin has the form from before torch 1.6: all of it is held in memory"
    ]
    out = convert(source, tmp_path / "out")
    assert same(load_file(out / "model.safetensors"), weights()) == []


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    source = convert(directory(tmp_path / "in", {"pytorch_model.bin": weights()}), tmp_path / "out")
    (source / "pytorch_model.bin").write_bytes(b"no matter")
    read(source)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    tensors = weights()
    norm = tensors.pop("model.norm.weight")
    tensors |= {
        "surplus": norm,
        "model.layers.1.mlp.up_proj.weight": norm,
        "model.layers.1.input_layernorm.weight": norm.int(),
    }
    message = error_of(directory(tmp_path / "in", {"pytorch_model.bin": tensors}))
    for part in (
        "model.norm.weight: missing",
        "surplus: unexpected",
        "model.layers.1.mlp.up_proj.weight: found shape [32], expected [48, 32]",
        "model.layers.1.input_layernorm.weight: found dtype int32, expected F64",
    ):
        assert part in message


def test_tensors_in_two_files(tmp_path: Path) -> None:
    first, second = (files := halves(weights())).values()
    second["model.norm.weight"] = first["model.norm.weight"] = weights()["model.norm.weight"]
    assert "model.norm.weight: in pytorch_model-00001" in error_of(
        directory(tmp_path / "in", files)
    )


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    source = directory(tmp_path / "in", halves(weights()))
    first, second = sorted(source.glob("*.bin"))
    second.write_bytes(second.read_bytes()[:-100])
    first.unlink()
    message = error_of(source)
    assert f"{first.name}: cannot be read (No such file or directory)" in message
    assert f"{second.name}: damaged" in message
    assert ": missing" not in message  # their tensors are accounted for


@pytest.mark.parametrize("place", ["../x.bin", "/etc/passwd", "..", "", "a/b.bin", 7])
def test_an_index_stays_in_its_directory(tmp_path: Path, place: Any) -> None:
    source = directory(tmp_path / "in", halves(weights()))
    write_index(source, {"model.norm.weight": place})
    assert "expected a file of the directory" in error_of(source)


def test_links_stay_in_the_directory(tmp_path: Path) -> None:
    source = directory(tmp_path / "in", {"pytorch_model.bin": weights()})
    (source / "pytorch_model.bin").rename(tmp_path / "elsewhere")
    (source / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere")
    assert "expected it to stay within" in error_of(source)


def test_values_that_are_not_finite_leave_nothing(tmp_path: Path) -> None:
    tensors = weights()
    tensors["model.norm.weight"][3] = torch.nan
    source = directory(tmp_path / "in", {"pytorch_model.bin": tensors})
    with pytest.raises(ValueError, match=r"pytorch_model.bin: tensor model.norm.weight: 1 values"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
