"""Files of `torch.save`: torchtitan's consolidated weights, and any program's state dict."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import convert
from parity_tests.convert.formats.gguf.tiny_gguf import same, tiny_model
from parity_tests.convert.formats.tiny_dcp import Tensors, titan_tensors, trained
from parity_tests.convert.test_damage import truncate

TREES: dict[str, Callable[[Any], Any]] = {
    "titan": titan_tensors,
    "titan, optimizer and all": lambda model: trained(titan_tensors(model)),
    "titan before 0.3": lambda model: titan_tensors(model, version="0.2"),
    "state dict": lambda model: model.state_dict(),
    "nested": lambda model: {"app": {"model": model.state_dict()}, "step": 3, "history": [1, 2]},
    "compiled": lambda model: {f"_orig_mod.{k}": v for k, v in model.state_dict().items()},
}


@pytest.mark.parametrize("tree", list(TREES))
def test_every_tensor_bit_for_bit(tmp_path: Path, tree: str) -> None:
    model = tiny_model(tie_word_embeddings=False).to(torch.bfloat16)
    tensors = TREES[tree](model)
    dtype = torch.float32 if "titan" in tree else torch.bfloat16  # tiny_meta makes float32
    model.config.save_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "model.pt")
    out = convert.convert(tmp_path / "model.pt", tmp_path / "out")
    expected = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    assert same(load_file(out / "model.safetensors"), expected) == []
    assert convert.info(tmp_path / "model.pt")["problems"] == []


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_refusals(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False)
    file = tmp_path / "model.pt"

    def error(content: Any) -> str:
        torch.save(content, file)
        with pytest.raises(ValueError) as caught:
            convert.convert(file, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    tensors: Tensors = titan_tensors(model)
    assert "config.json: not found; the weights in model.pt do not tell" in error(tensors)
    model.config.save_pretrained(tmp_path)
    evil = Evil(os.mkdir, str(tmp_path / "was here"))
    assert "refused: the pickle asks for posix.mkdir" in error(tensors | {"extra": evil})
    assert not (tmp_path / "was here").exists()
    del tensors["layers.1.ffn_norm.weight"]
    assert "post_attention_layernorm.weight: missing" in error(tensors)
    assert "holds no Llama" in error({"conv.weight": torch.zeros(2)})
    assert "holds no Llama" in error({})
    assert "holds a list" in error([torch.zeros(2)])


def test_cuts(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(titan_tensors(model), tmp_path / "model.pt")
    content, rng = (tmp_path / "model.pt").read_bytes(), random.Random(0)
    for _ in range(100):
        (tmp_path / "model.pt").write_bytes(content)
        what = truncate(tmp_path / "model.pt", rng)
        with pytest.raises(ValueError, match=r"model\.pt"):
            convert.convert(tmp_path / "model.pt", tmp_path / "out")
        assert not (tmp_path / "out").exists(), what
