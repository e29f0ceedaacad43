"""Changes of the model on the way: right values from torch and transformers, streamed and proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

import convert
from convert import Surgery, record
from convert.__main__ import main
from convert.formats import registry
from convert.surgery.average import averaged
from convert.surgery.layers import _numbers
from parity_tests.convert.formats.gguf.tiny_gguf import same, tiny_model
from parity_tests.convert.formats.tiny_dcp import save

Tensors = dict[str, torch.Tensor]


def weights(directory: Path) -> Tensors:
    return {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    model = tiny_model(num_hidden_layers=4, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    return model


def run(tmp_path: Path, **options: Any) -> Path:
    return convert.convert(tmp_path / "model", tmp_path / "out", **options)


def error(tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_layers(tmp_path: Path, model: Any) -> None:
    """transformers computes what it does with the other layers taken out."""
    out = run(tmp_path, surgery=Surgery(layers="0,2-3"))
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 2, 3))
    assert same(weights(out), model.state_dict()) == []
    loaded = AutoModelForCausalLM.from_pretrained(out)
    model.config.num_hidden_layers = 3
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, model(ids, use_cache=False).logits)


def test_damage_is_found_on_the_way(tmp_path: Path, model: Any) -> None:
    """In the source and in what it is averaged with: safetensors have no checksums of their own."""
    convert.convert(tmp_path / "model", tmp_path / "other")
    file = tmp_path / "other/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    message = error(tmp_path, surgery=Surgery(average=[tmp_path / "other"]))
    assert "other: tensor model.norm.weight: its SHA-256 is not the one" in message
    (tmp_path / "model").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "model")
    for surgery in (
        Surgery(layers="0"),
        Surgery(vocab_size=44),
        Surgery(average=[tmp_path / "before"]),
    ):
        assert "its SHA-256 is not the one" in error(tmp_path, surgery=surgery)


@pytest.mark.parametrize(
    "text", ["0-4", "7", "2-1", "1,0", "0,0", "0-2,2", "", "a", "0-", "-1", "0;1"]
)
def test_layers_that_are_none(tmp_path: Path, model: Any, text: str) -> None:
    assert "layers: found " in error(tmp_path, surgery=Surgery(layers=text))


def test_numbers_of_layers() -> None:
    assert _numbers("0-3", 4) == [0, 1, 2, 3]
    assert _numbers("1, 3", 4) == [1, 3]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", ["mean", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_larger_vocabulary(tmp_path: Path, tied: bool, rows: str, dtype: torch.dtype) -> None:
    model = tiny_model(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "model")
    out = run(tmp_path, surgery=Surgery(vocab_size=47, new_rows=rows))
    tensors = weights(out)
    for name, before in model.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight") and name in tensors:
            mean = before.double().mean(0) if rows == "mean" else torch.zeros(before.shape[1])
            expected = torch.cat((before, mean.to(dtype).expand(7, -1)))
            assert torch.equal(tensors[name], expected), name
        elif name in tensors:
            assert torch.equal(tensors[name], before), name
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 47
    assert AutoModelForCausalLM.from_pretrained(out)(torch.tensor([[46]])).logits.shape[-1] == 47


def test_a_smaller_vocabulary(tmp_path: Path, model: Any) -> None:
    out = run(tmp_path, surgery=Surgery(vocab_size=33))
    model.resize_token_embeddings(33)
    assert same(weights(out), model.state_dict()) == []


def test_vocabularies_that_cannot_be(tmp_path: Path, model: Any) -> None:
    assert "found 2, but eos_token_id is 2" in error(tmp_path, surgery=Surgery(vocab_size=2))
    assert "expected a positive number" in error(tmp_path, surgery=Surgery(vocab_size=0))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(36)}, unk_token="w0"))
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    message = error(tmp_path, surgery=Surgery(vocab_size=largest))
    assert f"the tokenizer has ids up to {largest}" in message
    run(tmp_path, surgery=Surgery(vocab_size=largest + 1))


def test_the_mean_of_several_formats(tmp_path: Path, model: Any) -> None:
    others = [tiny_model(seed, num_hidden_layers=4, tie_word_embeddings=False) for seed in (1, 2)]
    for number, other in enumerate(others):
        other.save_pretrained(tmp_path / f"other{number}")
    convert.convert(tmp_path / "other0", tmp_path / "other.gguf", dtype="float32")
    convert.convert(tmp_path / "other1", tmp_path / "dcp", to="dcp")
    average = (tmp_path / "other.gguf", tmp_path / "dcp")
    out = run(tmp_path, surgery=Surgery(average=average, weights=(1, 2, 5)))
    states = [each.state_dict() for each in (model, *others)]
    for name, tensor in weights(out).items():
        expected = sum(w * s[name].double() for w, s in zip((1, 2, 5), states, strict=True)) / 8
        bound = 3 * 2.0**-24 * sum(s[name].double().abs() for s in states)
        assert ((tensor.double() - expected).abs() <= bound).all(), name
    half = convert.convert(
        tmp_path / "model",
        tmp_path / "half",
        dtype="bfloat16",
        surgery=Surgery(average=average[:1]),
    )
    for name, tensor in weights(half).items():
        mean = (states[0][name] + states[1][name]) / 2  # in float32, rounded once
        assert torch.equal(tensor, mean.bfloat16()), name
    facts = json.loads((half / record.FILE).read_text())
    assert facts["source"] == "the average of 2 checkpoints"
    both = averaged([registry.read(path) for path in (tmp_path / "model", average[0])], None)
    assert {file.name for file in both.weight_files} == {"model.safetensors", "other.gguf"}


def test_the_mean_of_float64(tmp_path: Path, model: Any) -> None:
    """Is not rounded to float32."""
    states = [
        {k: v.double() + shift for k, v in model.state_dict().items()} for shift in (0, 1e-12)
    ]
    for name, state in zip(("model", "other"), states, strict=True):
        model.double().save_pretrained(tmp_path / name, state_dict=dict(state))
    out = run(tmp_path, surgery=Surgery(average=[tmp_path / "other"]))
    for name, tensor in weights(out).items():
        expected = states[0][name] / 2 + states[1][name] / 2
        assert torch.equal(tensor, expected), name


def test_means_that_cannot_be(tmp_path: Path, model: Any) -> None:
    other = tmp_path / "other"
    tiny_model(num_hidden_layers=3, tie_word_embeddings=False).save_pretrained(other)
    message = error(tmp_path, surgery=Surgery(average=[other]))
    assert message.startswith("average: checkpoint 2 has num_hidden_layers 3, expected 4")
    model.save_pretrained(tmp_path / "same")
    for wrong in ([1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0], [1e308, 1e308]):
        surgery = Surgery(average=[tmp_path / "same"], weights=wrong)
        assert error(tmp_path, surgery=surgery).startswith("weights: found ")
    assert error(tmp_path, surgery=Surgery(weights=[1.0])).startswith("weights: of what?")


def test_some_tensors_are_cast(tmp_path: Path, model: Any) -> None:
    out = run(tmp_path, dtype="bfloat16", surgery=Surgery(cast_only=r"mlp\.|embed"))
    expected = {
        name: tensor.bfloat16() if "mlp." in name or "embed" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    assert same(weights(out), expected) == []


def test_casts_that_cannot_be(tmp_path: Path, model: Any) -> None:
    assert "needs a dtype" in error(tmp_path, surgery=Surgery(cast_only="mlp"))
    for pattern, reason in {
        "(": "no regular expression",
        "nowhere": "no tensor's name has",
    }.items():
        assert reason in error(tmp_path, dtype="float16", surgery=Surgery(cast_only=pattern))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 39])
def test_so_many_shards(tmp_path: Path, model: Any, count: int) -> None:
    out = run(tmp_path, shards=count)
    assert len(list(out.glob("*.safetensors"))) == count
    assert same(weights(out), model.state_dict()) == []


def test_shards_that_cannot_be(tmp_path: Path, model: Any) -> None:
    for count in (0, -1, 40):
        assert f"to_shards: found {count}, expected 1 to 39" in error(tmp_path, shards=count)
    assert "Hugging Face only" in error(tmp_path, shards=2, to="orbax")
    assert "Hugging Face only" in error(tmp_path, shards=2, max_shard_size=100)


@pytest.mark.parametrize("kind", ["hf", "bin", "dcp", "pt"])
def test_other_names(tmp_path: Path, model: Any, kind: str) -> None:
    rules = {r"^blocks/(\d+)/": r"model.layers.\1.", "^emb/": "model.embed_tokens.", r"/": "."}
    tensors = {
        name.replace("model.layers.", "blocks/")
        .replace("model.embed_tokens.", "emb/")
        .replace(".", "/"): tensor
        for name, tensor in model.state_dict().items()
    }
    source = tmp_path / "source"
    source.mkdir()
    model.config.save_pretrained(source)
    if kind == "hf":
        save_file(tensors, source / "model.safetensors")
    elif kind == "dcp":
        save(tensors, source)
    else:
        torch.save(tensors, source / ("pytorch_model.bin" if kind == "bin" else "m.pt"))
    file = tmp_path / "names.json"
    file.write_text(json.dumps(rules))
    path = source / "m.pt" if kind == "pt" else source
    out = convert.convert(path, tmp_path / "out", rename=file)
    assert same(weights(out), model.state_dict()) == []


def test_names_that_cannot_be(tmp_path: Path, model: Any) -> None:
    file = tmp_path / "names.json"
    for rules, reason in (
        ({"(": ""}, "'('"),
        ({"a": r"\1"}, "invalid group reference"),
        ({"a": 3}, "found 3, expected a text"),
        ({"mlp.up_proj": "mlp.gate_proj"}, "both become"),
        ({"mlp": "nlp"}, "missing"),
    ):
        file.write_text(json.dumps(rules))
        assert reason in error(tmp_path, rename=file)
    convert.convert(tmp_path / "model", tmp_path / "m.gguf")
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"rename is for Hugging Face, .*, not for GGUF"):
        convert.plan(tmp_path / "m.gguf", tmp_path / "none", rename=file)


def test_from_the_command_line(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path / "same")
    arguments = [
        str(tmp_path / "model"),
        str(tmp_path / "out"),
        "--average",
        str(tmp_path / "same"),
    ]
    arguments += [
        "--weights",
        "1",
        "3",
        "--layers",
        "0-1",
        "--vocab-size",
        "44",
        "--to-shards",
        "2",
    ]
    assert main(arguments) == 0
    tensors = weights(tmp_path / "out")
    assert tensors["lm_head.weight"].shape == (44, 32)
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_allclose(tensors[name], model.state_dict()[name], rtol=1e-6)
    assert main(["--layers", "9", *arguments[:1], str(tmp_path / "none")]) == 2
