"""A tokenizer on its way from and to Meta's form: the same ids on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, GenerationConfig

from convert import convert, info
from convert.formats.meta import read
from llama_jax.config import LlamaConfig
from llama_jax.text.tokenizer import load_tokenizer, model_json
from parity_tests.convert.formats.gguf.test_tokenizer_read import byte_level_fields
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_gguf, tiny_model
from parity_tests.convert.formats.meta.tiny_meta import meta_params, meta_tensors, write_meta
from parity_tests.harness.tiny_tokenizers import (
    HARD,
    sentencepiece_model,
    tiktoken_encoding,
    tiktoken_model,
    tiktoken_ranks,
)

TOKENS = {"sentencepiece": 600, "tiktoken": 480 + 256}
CONTENT = {"sentencepiece": sentencepiece_model, "tiktoken": tiktoken_model}


def meta_directory(path: Path, form: str, content: bytes | None = None) -> Path:
    model = tiny_model(vocab_size=TOKENS[form], intermediate_size=96)
    write_meta(path, [meta_tensors(model)], meta_params(model))
    (path / "tokenizer.model").write_bytes(CONTENT[form]() if content is None else content)
    return path


def hf_directory(path: Path, vocab_size: int, files: dict[str, Any]) -> Path:
    tiny_model(vocab_size=vocab_size, intermediate_size=96).save_pretrained(path)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize("form", list(CONTENT))
def test_hugging_face_reads_the_ids_of_metas_library(tmp_path: Path, form: str, to: str) -> None:
    out = convert(meta_directory(tmp_path / "in", form), tmp_path / "out", to=to)
    assert (out / "tokenizer.model").read_bytes() == CONTENT[form]()
    theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(out)
    config, generation = LlamaConfig.from_pretrained(out), GenerationConfig.from_pretrained(out)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (config.bos_token_id, config.eos_token_id)
    if form == "tiktoken":
        bos = len(tiktoken_ranks())
        # Llama 3.0's, for the positions are not scaled
        assert generation.eos_token_id == [bos + 1, bos + 9]
    else:
        bos = 1
        assert generation.eos_token_id == 2
    assert config.bos_token_id == bos
    for text in HARD:
        if form == "tiktoken":
            encoding = tiktoken_encoding(release_3_0=True)
            expected = encoding.encode(text, allowed_special="all")
        elif "<s>" in text:
            continue  # matched by Hugging Face, text to SentencePiece
        else:
            model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
            expected = model.encode(text)
        assert theirs(text).input_ids == ours.encode(text).ids == [bos, *expected]


@pytest.mark.parametrize("form", list(CONTENT))
def test_there_and_back(tmp_path: Path, form: str) -> None:
    source = meta_directory(tmp_path / "in", form)
    back = convert(convert(source, tmp_path / "hf"), tmp_path / "out", to="meta")
    assert (back / "tokenizer.model").read_bytes() == CONTENT[form]()
    assert read(back).files == read(source).files
    assert read(back).config["bos_token_id"] == read(source).config["bos_token_id"]


def test_into_gguf(tmp_path: Path) -> None:
    for form in CONTENT:
        source = meta_directory(tmp_path / form, form)
        back = convert(convert(source, tmp_path / f"{form}.gguf"), tmp_path / f"{form}-back")
        ours, theirs = load_tokenizer(source), load_tokenizer(back)
        for text in HARD:
            assert ours.encode(text).ids == theirs.encode(text).ids


def test_ranks_are_recovered_from_llama_3s_tokenizer_json(tmp_path: Path) -> None:
    files = {"tokenizer.json": model_json(tiktoken_model())}
    source = hf_directory(tmp_path / "in", TOKENS["tiktoken"], files)
    out = convert(source, tmp_path / "out", to="meta")
    assert (out / "tokenizer.model").read_bytes() == tiktoken_model()


def test_a_tokenizer_that_metas_format_cannot_hold_is_copied(tmp_path: Path) -> None:
    fields = byte_level_fields("smollm")
    model = tiny_model(vocab_size=len(fields["tokenizer.ggml.tokens"]))
    source = convert(tiny_gguf(tmp_path / "m.gguf", model, fields=fields), tmp_path / "hf")
    out = convert(source, tmp_path / "out", to="meta")
    assert not (out / "tokenizer.model").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("form", list(CONTENT))
def test_a_damaged_tokenizer(tmp_path: Path, form: str) -> None:
    source = meta_directory(tmp_path / "in", form, CONTENT[form]()[:-50])
    with pytest.raises(
        ValueError, match=r"tokenizer.model: .*; use --no-tokenizer to leave it out$"
    ):
        convert(source, tmp_path / "out")
    assert info(source)["problems"] != []
    convert(source, tmp_path / "out", tokenizer=False)
    assert not (tmp_path / "out/tokenizer.model").exists()


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    source = meta_directory(tmp_path / "in", "sentencepiece", tiktoken_model())
    with pytest.raises(ValueError, match=r"736 tokens, expected at most vocab_size 600"):
        convert(source, tmp_path / "out")
