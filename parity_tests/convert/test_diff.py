"""`convert diff`: each kind of difference made by torch, and found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import convert
from convert.__main__ import main
from convert.diff import diff
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model

Q, OUT, DOWN, NORM = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
)


def adapted(w: torch.Tensor, rank: int, size: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    b, a = (torch.randn(n, rank, generator=generator) for n in w.shape)
    return w + size * w.std() * (b @ a.T) / rank**0.5


def shuffled(w: torch.Tensor) -> torch.Tensor:
    return w[torch.randperm(len(w), generator=torch.Generator().manual_seed(0))]


KINDS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "cast to bfloat16": (DOWN, lambda w: w.bfloat16()),
    "cast to float16": (NORM, lambda w: w.half()),
    "rounded to bfloat16": (DOWN, lambda w: w.bfloat16().float()),
    "permutation of rows": (DOWN, shuffled),
    "permutation of columns": (DOWN, lambda w: shuffled(w.T).T.contiguous()),
    "permutation of rows, of RoPE's pairs": (
        Q,
        lambda w: w.view(8, 2, 4, 64).transpose(1, 2).reshape(64, 64),
    ),
    "permutation": (NORM, shuffled),
    "transpose": (OUT, lambda w: w.T.contiguous()),
    "scale, 0.125": (DOWN, lambda w: w * 0.125),
    "scale, -3": (NORM, lambda w: w * -3),
    "low rank, 1": (Q, lambda w: adapted(w, 1)),
    "low rank, 4": (DOWN, lambda w: adapted(w, 4)),
    "signs of zeros": (DOWN, lambda w: torch.where(w == 0, -0.0, w)),
    "other values": (DOWN, lambda w: w + 0.01 * torch.randn_like(w)),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        head_dim=8,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize("size", [1e-38, 1e-3, 3e38, 1e200])
def test_unlike_values_of_any_size(tmp_path: Path, model: Any, size: float) -> None:
    """Not "scale, 0", for the first tells nothing of the other; nor an overflow."""
    before = model.state_dict()
    other = torch.rand(before[DOWN].shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    other = other.double() if size > 1e39 else other
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "other", state_dict=before | {DOWN: other * size})
    for first, second in (("one", "other"), ("other", "one")):
        (difference,) = diff(tmp_path / first, tmp_path / second).differences
        assert difference.kind == "other values"


def test_json_of_a_change_from_zeros(
    tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = model.state_dict()
    model.save_pretrained(tmp_path / "one", state_dict=before | {DOWN: 0 * before[DOWN]})
    model.save_pretrained(tmp_path / "other")
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "other"), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert shown["differences"][0]["relative"] is None


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_explains_a_difference(tmp_path: Path, model: Any, kind: str) -> None:
    name, change = KINDS[kind]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before[DOWN][0, 0] = 0.0
    model.save_pretrained(tmp_path / "one", state_dict=dict(before))
    after = change(before[name])
    model.save_pretrained(tmp_path / "other", state_dict=before | {name: after})
    result = diff(tmp_path / "one", tmp_path / "other")
    (difference,) = result.differences
    assert (difference.name, difference.kind) == (name, kind)
    assert result.same == 20
    assert result.config == []
    delta = after.double() - before[name].double()
    assert difference.largest == pytest.approx(float(delta.abs().max()), rel=1e-9)
    expected = float(delta.norm() / before[name].double().norm())
    assert difference.relative == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [0.1, 0.02])
def test_an_adapter_merged_into_bfloat16(tmp_path: Path, model: Any, size: float) -> None:
    """Rounding is of full rank, and known."""
    before = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "one", state_dict=dict(before))
    merged = adapted(before[DOWN].float(), 2, size).bfloat16()
    model.save_pretrained(tmp_path / "other", state_dict=before | {DOWN: merged})
    (difference,) = diff(tmp_path / "one", tmp_path / "other").differences
    assert difference.kind == "low rank, 2"


def test_across_formats_and_by_the_command_line(
    tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "one")
    convert.convert(tmp_path / "one", tmp_path / "dcp", to="dcp")
    convert.convert(tmp_path / "one", tmp_path / "lit", to="litgpt", dtype="bfloat16")
    one, dcp, lit = (str(tmp_path / name) for name in ("one", "dcp", "lit"))
    assert main(["diff", one, dcp]) == 0
    assert "21 tensors are the same, 0 differ" in capsys.readouterr().out
    assert main(["diff", one, lit, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {each["kind"] for each in found["differences"]} == {"cast to bfloat16"}
    shorter = convert.convert(
        one, tmp_path / "cut", surgery=convert.Surgery(layers="0", vocab_size=38)
    )
    assert main(["diff", one, str(shorter)]) == 1
    out = capsys.readouterr().out
    assert "config: vocab_size 38, expected 40" in out
    assert "2 rows fewer" in out
    assert "only in the first" in out
    assert main(["diff", one, str(tmp_path / "nowhere")]) == 2
