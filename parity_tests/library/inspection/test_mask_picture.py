"""The picture of the mask is the mask: the model's, which is transformers'."""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from llama_jax import LlamaConfig, LlamaForCausalLM, LlamaModel, init_cache
from llama_jax.__main__ import main
from llama_jax.inspection.mask_picture import MaskPicture, draw_text, mask_pictures, visible_keys
from parity_tests.harness.cases import BASE, hf_config


def hf_mask(is_token: np.ndarray | None, shape: tuple[int, int], **more: Any) -> np.ndarray:
    """The mask that transformers' eager attention adds, as booleans [batch, queries, keys]."""
    config = hf_config(BASE)
    config._attn_implementation = "eager"
    attention_mask = None if is_token is None else torch.from_numpy(is_token.astype(np.int64))
    more = {"past_key_values": None} | more
    embeds = torch.zeros(*shape, BASE["hidden_size"])
    return (create_causal_mask(config, embeds, attention_mask, **more) == 0)[:, 0].numpy()


def past(cached: int) -> DynamicCache:
    cache = DynamicCache(config=hf_config(BASE))
    for layer in range(BASE["num_hidden_layers"]):
        cache.update(torch.zeros(2, 2, cached, 8), torch.zeros(2, 2, cached, 8), layer)
    return cache


WHOLE = np.ones((2, 7), bool)
PADDED = {"left": np.arange(7) >= [[0], [3]], "right": np.arange(7) < [[7], [4]]}


def test_causal_mask_equals_transformers() -> None:
    assert np.array_equal(visible_keys(WHOLE), hf_mask(None, (2, 7)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [0, 3, 6])
def test_padded_and_cached_mask_equals_transformers(side: str, cached: int) -> None:
    cache = past(cached) if cached else None
    want = hf_mask(PADDED[side], (2, 7 - cached), past_key_values=cache)
    assert np.array_equal(visible_keys(PADDED[side], cached=cached), want)


def test_packed_mask_equals_transformers() -> None:
    """Which infers packing from positions that start anew."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    segments = (positions == 0).cumsum(1).numpy()
    want = hf_mask(None, (2, 7), position_ids=positions)
    assert np.array_equal(visible_keys(WHOLE, segments), want)


@pytest.mark.parametrize("cached", [0, 4])
def test_the_model_attends_where_the_picture_says(cached: int) -> None:
    """Attention weights are positive there and zero elsewhere."""
    config = LlamaConfig.from_dict(BASE)
    model = LlamaModel(config, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, 61, (2, 7)).astype(np.int32)
    segments = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]], np.int32)
    cache = None
    if cached:
        cache = init_cache(config, 2, 7, jnp.float32)
        first = slice(cached)
        cache = model(
            ids[:, first], PADDED["left"][:, first], segment_ids=segments[:, first], cache=cache
        ).cache
    rest = slice(cached, None)
    weights = model(
        ids[:, rest],
        PADDED["left"][:, rest],
        segment_ids=segments[:, rest],
        cache=cache,
        output_attentions=True,
    ).attentions
    visible = visible_keys(PADDED["left"], segments, cached=cached)
    for layer in weights:
        assert np.array_equal(np.asarray(layer).all(axis=1), visible)
        assert np.array_equal(np.asarray(layer).any(axis=1), visible)


def test_pictures_of_each_kind() -> None:
    texts = [["a", "b", "c"], ["d"]]
    padded, short = mask_pictures(texts, padding_side="left")
    assert (padded.title, short.title) == (
        "causal, padded on the left, row 1",
        "causal, padded on the left, row 2",
    )
    assert short.keys == short.queries == ["<pad>", "<pad>", "d"]
    assert short.visible.tolist() == [[False] * 3, [False] * 3, [False, False, True]]
    (packed,) = mask_pictures(texts, packed=True, cached=1)
    assert packed.title == "2 packed texts, 1 cached"
    assert packed.keys == ["a", "b", "c", "d"]
    assert packed.queries == ["b", "c", "d"]
    assert packed.visible.tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [False, False, False, True],
    ]
    (plain,) = mask_pictures([["a", "b"]])
    assert plain.title == "causal"


def cells(line: str) -> list[bool]:
    """What a drawn line says: its last columns are marks."""
    return [mark == "■" for mark in line.split() if mark in ("■", "·")]


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    packed=st.booleans(),
    side=st.sampled_from(["left", "right"]),
    data=st.data(),
)
@settings(deadline=None, max_examples=12)
def test_the_drawing_shows_the_mask(
    lengths: list[int], packed: bool, side: str, data: st.DataObject
) -> None:
    texts = [["w"] * length for length in lengths]
    longest = sum(lengths) if packed else max(lengths)
    cached = data.draw(st.integers(0, longest - 1))
    for picture in mask_pictures(texts, packed=packed, padding_side=side, cached=cached):
        drawn = draw_text(picture, 80).plain.splitlines()
        marks = [row for row in map(cells, drawn[2:]) if row]
        assert marks == picture.visible.tolist()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_long_text_is_clipped_in_the_middle(width: int) -> None:
    names = [f"token{index}日本\n" for index in range(300)]
    picture = MaskPicture("causal", np.tri(300, dtype=bool), names, names)
    drawn = draw_text(picture, width)
    lines = drawn.plain.splitlines()
    assert max(map(cell_len, lines[1:])) <= width
    assert lines[-1] == "300 x 300 tokens, the middle left out"
    last = lines[-2]
    assert last.startswith("299 ")
    assert all(cells(last))
    assert "…" in last
    assert len(lines) < width


def test_cached_beyond_the_text() -> None:
    with pytest.raises(ValueError, match="cached: found 7, expected 0 to 6 of 7 tokens"):
        visible_keys(WHOLE, cached=7)
    with pytest.raises(ValueError, match=r"segment_ids: found shape \(1, 7\), expected \(2, 7\)"):
        visible_keys(WHOLE, np.zeros((1, 7), np.int32))


# The command -------------------------------------------------------------------------------------

WORDS = ["<unk>", *["the", "capital", "of", "France", "is", "Paris", "a", "[b]", "$c$"]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mask") / "model"
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    LlamaForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def mask(directory: Path, *arguments: str) -> int:
    return main(["mask", "--model", str(directory), *arguments])


def test_mask_prints_and_draws(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "mask.png"
    assert (
        mask(directory, "--text", "the capital", "[b] $c$ of", "--packed", "--png", str(png)) == 0
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert "2 packed texts" in lines[0]
    assert [cells(line) for line in lines[2:] if cells(line)] == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [False, False, True, False, False],
        [False, False, True, True, False],
        [False, False, True, True, True],
    ]
    assert any(line.startswith("2 [b] ") for line in lines)
    from matplotlib.image import imread

    assert imread(png).shape[2] == 4
    assert list(tmp_path.iterdir()) == [png]


def test_mask_of_a_padded_batch(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--text",
        "a",
        "--text",
        "the capital of",
        "--padding-side",
        "left",
        "--cached",
        "2",
    )
    assert mask(directory, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "row 1" in line or "row 2" in line] == [
        f"causal, padded on the left, 2 cached, row {row}" for row in (1, 2)
    ]
    drawn = [cells(line) for line in lines if line.startswith("2 ")]
    assert drawn == [[False, False, True], [True, True, True]]
    assert max(map(len, lines)) <= 80


def test_a_png_without_matplotlib(
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert mask(directory, "--text", "a", "--png", str(tmp_path / "x.png")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("error: matplotlib is not installed: pip install 'llama-jax[plot]'\n")
    assert mask(directory, "--text", "a") == 0  # the terminal needs none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", ""], "--text: found an empty text"),
        (["--text", " "], "text 1: tokenizes to no tokens"),
        (["--text", " ".join("a" * 17)], "--text: found 17 tokens in a row, expected at most 16"),
        (["--packed", "--text", *["a a a"] * 6], "--text: found 18 tokens in a row"),
        (["--text", "a a", "--cached", "2"], "--cached: found 2, expected 0 to 1 of 2 tokens"),
        (["--text", "a a", "--cached", "0"], "--cached: found '0', expected a positive"),
        (
            ["--text", "a", "--padding-side", "top"],
            "--padding-side: found 'top', expected one of left, right",
        ),
        (["--text", "a", "--png", "/absent/x.png"], "/absent"),
        ([], "--text"),
    ],
)
def test_bad_mask_arguments(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert mask(directory, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_mask_with_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mask(tmp_path / "absent", "--text", "a") == 2
    assert capsys.readouterr().err.endswith("absent: no such directory\n")
