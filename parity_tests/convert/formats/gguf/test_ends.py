"""End tokens known by their text, licenses and sampling: into GGUF and out of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert import convert, info, plan
from convert.checkpoint import dtype_name
from convert.formats.gguf.generation import sampling_metadata, unusable_sampling
from convert.formats.gguf.tokenizer.ends import end_ids
from convert.model_card import card_facts, card_of
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_gguf, tiny_model

TOKENS = [f"t{i}" for i in range(40)]


def metadata(texts: dict[int, str], **keys: int) -> dict[str, Any]:
    tokens = [texts.get(i, token) for i, token in enumerate(TOKENS)]
    named = {f"tokenizer.ggml.{name}_token_id": i for name, i in keys.items()}
    return {"tokenizer.ggml.tokens": tokens, **named}


# (texts by id, keys, the set that llama.cpp's llama-vocab.cpp makes its special_eog_ids)
ENDS = [
    ({7: "<|eot_id|>"}, {"eos": 2}, [2, 7]),
    ({7: "<|eot_id|>", 5: "<|eom_id|>", 2: "<|end_of_text|>"}, {"eos": 2}, [2, 5, 7]),
    ({7: "<|im_end|>", 3: "<|endoftext|>"}, {"eos": 7}, [7, 3]),
    ({}, {"eos": 2, "eot": 9, "eom": 8}, [2, 9, 8]),
    ({7: "<|end|>"}, {"eos": 2}, [2, 7]),
    ({7: "<|end|>", 8: "<|return|>", 9: "<|call|>"}, {"eos": 8}, [8, 9]),
    ({7: "<|end|>", 8: "<|calls|>", 9: "<|flush|>"}, {"eos": 8}, [8, 9]),
    ({7: "</s>", 8: "<|tool_response>"}, {"eos": 2}, [2, 8]),
    ({7: "<|fim_pad|>", 8: "<|repo_name|>", 9: "<|file_sep|>"}, {"eos": 2}, [2, 7, 8, 9]),
    ({7: "<|fim_pad|>"}, {"eos": 2, "fim_pad": 4}, [2, 4]),
    ({7: "<|start|>"}, {}, []),
]


@pytest.mark.parametrize(("texts", "keys", "expected"), ENDS)
def test_the_ends_that_llama_cpp_finds(texts, keys, expected):
    assert end_ids(metadata(texts, **keys)) == expected


def test_a_file_without_a_vocabulary_has_those_of_its_keys():
    assert end_ids({"tokenizer.ggml.eos_token_id": 2}) == [2]
    assert end_ids({"tokenizer.ggml.eos_token_id": "x", "tokenizer.ggml.tokens": 3}) == []


def test_a_converted_chat_model_ends_at_its_turn(tmp_path: Path) -> None:
    """The config's eos stays what the key says; the vocabulary's <|eot_id|> ends as well."""
    tokens = [f"t{i}" for i in range(39)] + ["<|eot_id|>"]
    fields = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.tokens": tokens}
    convert(tiny_gguf(tmp_path / "m.gguf", fields=fields), tmp_path / "out", tokenizer=False)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 39]
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 2


def saved(directory: Path, generation: dict[str, Any]) -> Path:
    tiny_model().save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_a_note_says_that_a_fourth_end_token_is_lost(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", {"eos_token_id": [2, 5, 7, 9]})
    notes = " ".join(plan(source, tmp_path / "m.gguf").notes)
    assert "llama.cpp will not stop at 9" in notes
    source = saved(tmp_path / "three", {"eos_token_id": [2, 5, 7]})
    assert "will not stop" not in " ".join(plan(source, tmp_path / "m.gguf").notes)


CARD = "---\nlicense: llama3.2\nlanguage:\n- en\n- no\nmodel_name: Tiny\n---\n# Tiny\n"


def test_license_and_languages_are_converted_both_ways(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", {"eos_token_id": 2})
    assert "license and languages are left out" in " ".join(plan(source, tmp_path / "x.gguf").notes)
    (source / "README.md").write_text(CARD)
    assert "license" not in " ".join(plan(source, tmp_path / "x.gguf").notes)
    convert(source, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    for path in (source, tmp_path / "m.gguf", tmp_path / "out"):
        facts = info(path)
        assert (facts["name"], facts["license"]) == ("Tiny", "llama3.2")
        assert facts["languages"] == ["en", "no"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"---\n",
        b"---\n[\n---\n",
        b"\xff",
        b"---\nlicense: 3\nlanguage: {a: b}\n---\n",
        b"---\n- x\n",
    ],
)
def test_a_card_may_be_anything(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    facts, notes = card_facts(tmp_path)
    assert facts == {}
    assert len(notes) <= 1
    assert card_of(facts) is None


def files(**fields: Any) -> dict[str, bytes]:
    return {"generation_config.json": json.dumps({"do_sample": True, **fields}).encode()}


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [None, -1, "0.7", [], {}, True, 10**400, float("nan")], ids=str)
def test_sampling_may_be_anything(name: str, value: Any) -> None:
    if name == "top_p" and value == 10**400:
        value = -(10**400)  # above 1 it keeps everything, which is a meaning
    written = sampling_metadata(files(**{name: value}))
    assert all(key == "general.sampling.temp" for key in written)
    assert (name in unusable_sampling(files(**{name: value}))) == (value is not None)


def test_sampling_that_is_off_is_written_as_off() -> None:
    """llama.cpp has defaults of its own (top_k 40, min_p 0.05) where a file does not say."""
    written = sampling_metadata(files(top_k=0, min_p=0.0, top_p=1.5, temperature=0.6))
    assert written == {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 0,
        "general.sampling.top_p": 1.0,
        "general.sampling.min_p": 0.0,
    }
    assert (
        sampling_metadata(files(do_sample=None))
        == sampling_metadata(files(do_sample=0, top_k=5))
        == {}
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16"), ("F64", "float64")),
        *(
            ("Q8_0", "q8_0"),
            ("Float32", "float32"),
            ("torch.bfloat16", "bfloat16"),
            ("fp16", "float16"),
        ),
        ("Q4_K", "q4_k"),
    ],
)
def test_dtypes_as_info_shows_them(text: str, expected: str) -> None:
    assert dtype_name(text) == expected


def test_a_dtype_in_capitals_converts(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", {"eos_token_id": 2})
    assert plan(source, tmp_path / "m.gguf", dtype="Q8_0").dtype == "q8_0"
    assert plan(source, tmp_path / "out", dtype="BF16").dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype: found 'q8_0', expected one of float32"):
        plan(source, tmp_path / "out", dtype="Q8_0")
