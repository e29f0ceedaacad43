"""Orbax directories with several problems: each is reported once, and hides none of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import convert
from convert.formats.orbax import read
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model


@pytest.fixture
def params(tmp_path: Path) -> Path:
    """The arrays of a converted model of one layer."""
    tiny_model(tie_word_embeddings=False, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    return convert.convert(tmp_path / "model", tmp_path / "orbax", to="orbax") / "params"


def edit(array: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what zarr says of an array."""
    metadata = json.loads((array / ".zarray").read_text())
    change(metadata)
    (array / ".zarray").write_text(json.dumps(metadata))


def problems_of(params: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read(params.parent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("unreadable", ["lm_head.weight", "model.layers.mlp.up_proj.weight"])
def test_an_unreadable_array_hides_no_other_problem(params: Path, unreadable: str) -> None:
    """Whatever the order in which arrays are listed: all others have a shape that is reported."""

    def narrow(metadata: dict[str, Any]) -> None:
        metadata["shape"][-1] -= 1
        metadata["chunks"][-1] -= 1

    others = [file.parent for file in params.glob("*/.zarray") if file.parent.name != unreadable]
    for array in others:
        edit(array, narrow)
    edit(params / unreadable, lambda metadata: metadata.update(dtype="<i4"))
    message = problems_of(params)
    assert f"{unreadable}: found dtype I32, expected F64" in message
    assert message.count("found shape [") == len(others) == 11
    assert "model.norm.weight: found shape [31], expected [32]" in message


def test_all_kinds_of_problems_are_reported_together(params: Path) -> None:
    edit(params / "lm_head.weight", lambda metadata: metadata.update(dtype="<i4"))
    (params / "model.layers.self_attn.q_proj.weight" / "0.0.0").unlink()
    edit(params / "model.norm.weight", lambda metadata: metadata.update(shape=[31], chunks=[31]))
    message = problems_of(params)
    assert "lm_head.weight: found dtype I32, expected F64" in message
    assert "model.layers.self_attn.q_proj.weight: some of its chunks are missing" in message
    assert "model.norm.weight: found shape [31], expected [32]" in message


def test_an_unreadable_array_is_not_reported_as_missing_too(params: Path) -> None:
    edit(params / "lm_head.weight", lambda metadata: metadata.update(dtype="<i4"))
    (params / "model.layers.self_attn.q_proj.weight" / "0.0.0").unlink()
    assert ": missing" not in problems_of(params)


def test_missing_and_unexpected_tensors_are_reported_beside_unreadable_ones(params: Path) -> None:
    (params / "model.layers.self_attn.q_proj.weight" / "0.0.0").unlink()
    norm = params / "model.norm.weight"
    norm.rename(params / "model.other.weight")
    message = problems_of(params)
    assert "q_proj.weight: some of its chunks are missing" in message
    assert "model.norm.weight: missing" in message
    assert "model.other.weight: unexpected" in message


def test_a_stack_without_layers(params: Path) -> None:
    array = params / "model.layers.mlp.up_proj.weight"
    edit(array, lambda metadata: metadata.update(shape=[], chunks=[]))
    assert "mlp.up_proj.weight: found shape [], expected a stack of layers" in problems_of(params)
