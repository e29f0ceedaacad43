"""Tokenizers into GGUF metadata: the same ids afterwards, by every reader, or a refusal."""

from __future__ import annotations

import heapq
import json
import random
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from convert import convert, plan
from convert.formats.gguf.tokenizer.pre_tokenizers import (
    PRE_TOKENIZERS,
    TRIALS,
    Pre,
    pre_tokenizer_of,
)
from llama_jax.text.sentencepiece import BYTE, CONTROL, UNUSED, USER_DEFINED
from parity_tests.convert.formats.gguf.test_tokenizer_read import (
    CORPUS,
    byte_level_fields,
    converted,
    hard_strings,
    sentencepiece_fields,
    trained_sentencepiece,
)
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model
from parity_tests.harness.demo_checkpoint import cache_directory
from train.data.stdlib import EOS, _train_bpe

Json = dict[str, Any]
SPLITTINGS = list(dict.fromkeys(PRE_TOKENIZERS.values()))
NAMES = {pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}  # the first of each


def directory(home: Path, files: dict[str, Any], rows: int, **options: Any) -> Path:
    """A Hugging Face checkpoint with these files beside it; objects are written as JSON."""
    tiny_model(vocab_size=rows, num_hidden_layers=1, **options).save_pretrained(home)
    (home / "generation_config.json").unlink()
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (home / name).write_bytes(data)
    return home


def metadata(path: Path) -> Json:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


@cache
def byte_level(pre: str = "llama-bpe") -> tuple[str, int]:
    """The text of a tokenizer.json, and how many tokens it has."""
    with tempfile.TemporaryDirectory() as folder:
        home = converted(Path(folder), byte_level_fields(pre))
        fields = byte_level_fields(pre)["tokenizer.ggml.tokens"]
        return (home / "tokenizer.json").read_text(), len(fields)


@cache
def sentencepiece_json() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return (converted(Path(folder), sentencepiece_fields()) / "tokenizer.json").read_text()


ROWS = len(sentencepiece_fields()["tokenizer.ggml.tokens"])


def same_ids(home: Path, original: Tokenizer, texts: list[str] | None = None) -> Json:
    """Through GGUF and back; the metadata of the GGUF between."""
    convert(home, home.parent / "m.gguf")
    convert(home.parent / "m.gguf", home.parent / "out")
    converted = Tokenizer.from_file(str(home.parent / "out/tokenizer.json"))
    for text in texts or hard_strings():
        assert converted.encode(text).ids == original.encode(text).ids, repr(text)
    return metadata(home.parent / "m.gguf")


# --- byte-level --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", NAMES.values())
def test_every_splitting_is_recognized(tmp_path: Path, pre: str) -> None:
    fields = byte_level_fields(pre)
    home = converted(tmp_path, fields)
    convert(home, tmp_path / "m.gguf")
    written = metadata(tmp_path / "m.gguf")
    assert PRE_TOKENIZERS[written["tokenizer.ggml.pre"]] == PRE_TOKENIZERS[pre]
    for key in ("model", "tokens", "token_type", "merges", "add_bos_token", "unknown_token_id"):
        assert written[f"tokenizer.ggml.{key}"] == fields[f"tokenizer.ggml.{key}"], key
    convert(tmp_path / "m.gguf", tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_text() == (home / name).read_text(), name


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "tekken", "qwen2"])
def test_transformers_own_reader_gives_the_same_ids(tmp_path: Path, pre: str) -> None:
    home = converted(tmp_path, byte_level_fields(pre))
    convert(home, tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = AutoTokenizer.from_pretrained(home)
    for text in hard_strings():
        if "zebra" not in text:  # it merges what Llama 3 takes whole from the vocabulary
            assert theirs(text).input_ids == ours(text).input_ids, repr(text)


def test_llama_3s_own_file(tmp_path: Path) -> None:
    content = json.loads(byte_level()[0])
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    loose = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    content["post_processor"] = {"type": "Sequence", "processors": [loose, template]}
    content["pre_tokenizer"]["pretokenizers"][-1]["trim_offsets"] = False
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    files = {
        "tokenizer.json": content,
        "tokenizer_config.json": {
            "bos_token": {"content": "<|im_start|>"},
            "eos_token": "<|im_end|>",
        },
    }
    rows = byte_level()[1]
    home = directory(tmp_path / "in", files, rows, eos_token_id=[0, 2])
    written = same_ids(home, Tokenizer.from_str(json.dumps(content)))
    assert written["tokenizer.ggml.pre"] == "llama-bpe"
    assert written["tokenizer.ggml.add_bos_token"] is True
    assert written["tokenizer.ggml.bos_token_id"] == 1
    assert written["tokenizer.ggml.eos_token_id"] == 2
    assert written["tokenizer.ggml.eot_token_id"] == 0


def test_a_tokenizer_trained_by_this_program(tmp_path: Path) -> None:
    tokenizer = _train_bpe(CORPUS)
    files = {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": {"eos_token": EOS},
    }
    rows = tokenizer.get_vocab_size()
    written = same_ids(directory(tmp_path / "in", files, rows + 3), tokenizer)
    assert written["tokenizer.ggml.pre"] == "gpt-2"
    assert written["tokenizer.ggml.tokens"][-3:] == [f"[PAD{rows + i}]" for i in range(3)]
    assert written["tokenizer.ggml.token_type"][-3:] == [UNUSED] * 3
    assert written["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id(EOS)


# --- SentencePiece -----------------------------------------------------------------------------------


def score_joined(text: str, fields: Json) -> list[int]:
    """llama.cpp's own algorithm (llama-vocab.cpp, llm_tokenizer_spm) on text without special tokens."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    if text and fields["tokenizer.ggml.add_space_prefix"]:
        text = " " + text
    parts: list[str | None] = list(text.replace(" ", "\u2581"))
    following = [*range(1, len(parts)), -1]
    previous = [*range(-1, len(parts) - 1)]
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            union = f"{parts[left]}{parts[right]}"
            if union in ids:
                heapq.heappush(queue, (-scores[ids[union]], left, right, union))

    for left, right in pairwise(range(len(parts))):
        offer(left, right)
    while queue:
        _, left, right, union = heapq.heappop(queue)
        if parts[left] is None or parts[right] is None or f"{parts[left]}{parts[right]}" != union:
            continue
        parts[left], parts[right] = union, None
        following[left] = following[right]
        if following[left] >= 0:
            previous[following[left]] = left
        offer(previous[left], left)
        offer(left, following[left])
    result = []
    for part in parts:
        if part is not None:
            is_token = part in ids
            result += [ids[part]] if is_token else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return result


def plain_strings() -> list[str]:
    return [text for text in hard_strings() if "<" not in text]


@pytest.mark.parametrize("with_model", [True, False], ids=["tokenizer.model", "merges"])
@pytest.mark.parametrize("prefix", [True, False])
def test_scores_join_as_merges_do(tmp_path: Path, with_model: bool, prefix: bool) -> None:
    fields = sentencepiece_fields(**{"ggml.add_space_prefix": prefix})
    home = converted(tmp_path, fields, "in")
    if with_model and prefix:
        (home / "tokenizer.model").write_bytes(trained_sentencepiece())
    original = Tokenizer.from_file(str(home / "tokenizer.json"))
    written = same_ids(home, original)
    for key in ("tokens", "token_type", "add_space_prefix", "unknown_token_id"):
        assert written[f"tokenizer.ggml.{key}"] == fields[f"tokenizer.ggml.{key}"], key
    if with_model and prefix:
        assert written["tokenizer.ggml.scores"][3:] == fields["tokenizer.ggml.scores"][3:]
    for text in plain_strings():
        ids = original.encode(text, add_special_tokens=False).ids
        assert score_joined(text, written) == ids, repr(text)


def metaspace(scheme: str) -> Json:
    """What transformers 5 writes for a Llama 2."""
    content = json.loads(sentencepiece_json())
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False,
    }  # fmt: skip
    return content


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_the_original_decides_where_its_rendering_differs(tmp_path: Path, scheme: str) -> None:
    files = {"tokenizer.json": metaspace(scheme)}
    home = directory(tmp_path / "in", files, ROWS)
    with pytest.raises(
        ValueError, match=r"would become .*put SentencePiece's tokenizer\.model beside it"
    ):
        plan(home, tmp_path / "m.gguf")
    (home / "tokenizer.model").write_bytes(trained_sentencepiece())
    convert(home, tmp_path / "m.gguf")
    fields = metadata(tmp_path / "m.gguf")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece())
    for text in plain_strings():
        assert score_joined(text, fields) == theirs.encode(text), repr(text)


def test_metaspace_without_a_prefix_is_the_same(tmp_path: Path) -> None:
    content = metaspace("never")
    content["decoder"]["decoders"].pop()
    home = directory(tmp_path / "in", {"tokenizer.json": content}, ROWS)
    written = same_ids(home, Tokenizer.from_str(json.dumps(content)))
    assert written["tokenizer.ggml.add_space_prefix"] is False


def test_a_tokenizer_model_alone(tmp_path: Path) -> None:
    files = {
        "tokenizer.model": trained_sentencepiece(),
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "added_tokens_decoder": {
                str(ROWS): {"content": "<|extra|>", "special": False},
                str(ROWS + 1): {"content": "<|end|>", "special": True},
            },
        },
    }
    home = directory(tmp_path / "in", files, ROWS + 8)
    convert(home, tmp_path / "m.gguf")
    written = metadata(tmp_path / "m.gguf")
    assert written["tokenizer.ggml.tokens"][ROWS:] == [
        "<|extra|>", "<|end|>", *(f"[PAD{i}]" for i in range(ROWS + 2, ROWS + 8)),
    ]  # fmt: skip
    assert written["tokenizer.ggml.token_type"][ROWS:] == [USER_DEFINED, CONTROL, *[UNUSED] * 6]
    assert written["tokenizer.ggml.token_type"].count(BYTE) == 256
    assert (written["tokenizer.ggml.add_bos_token"], written["tokenizer.ggml.bos_token_id"]) == (
        True,
        1,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece())
    for text in plain_strings():
        assert score_joined(text, written) == theirs.encode(text), repr(text)


# --- around the vocabulary ---------------------------------------------------------------------------


def test_chat_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    files = {
        "tokenizer.json": json.loads(byte_level()[0]),
        "tokenizer_config.json": {"chat_template": named, "bos_token": "<|im_start|>"},
    }
    home = directory(tmp_path / "in", files, byte_level()[1])
    convert(home, tmp_path / "m.gguf")
    written = metadata(tmp_path / "m.gguf")
    assert written["tokenizer.chat_template"] == "a"
    assert written["tokenizer.chat_template.tool_use"] == "b"
    assert written["tokenizer.chat_templates"] == ["tool_use"]
    (home / "chat_template.jinja").write_text("of its own")
    convert(home, tmp_path / "n.gguf")
    assert metadata(tmp_path / "n.gguf")["tokenizer.chat_template"] == "of its own"


def test_without_a_tokenizer(tmp_path: Path) -> None:
    files = {"tokenizer.json": json.loads(byte_level()[0])}
    home = directory(tmp_path / "in", files, byte_level()[1])
    convert(home, tmp_path / "m.gguf", tokenizer=False)
    written = metadata(tmp_path / "m.gguf")
    assert [key for key in written if key.startswith("tokenizer.")] == [
        "tokenizer.ggml.model", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
    ]  # fmt: skip
    assert written["tokenizer.ggml.model"] == "none"
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").exists()


# --- what is refused ---------------------------------------------------------------------------------


def changed(**parts: Any) -> Json:
    return json.loads(byte_level()[0]) | parts


def with_added(**flags: Any) -> Json:
    content = json.loads(byte_level()[0])
    content["added_tokens"][0] |= flags
    return content


def late_merge() -> Json:
    """A merge that makes again what an early one makes, at the end of the list."""
    content = json.loads(sentencepiece_json())
    merges = content["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    twice = next(i for i, token in enumerate(made) if made.count(token) > 1)
    merges.append(merges.pop(twice))
    return content


def without_bytes() -> Json:
    content = json.loads(sentencepiece_json())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {
        "<byte>" if token == "<0x41>" else token: i for token, i in vocabulary.items()
    }
    return content


LOOSE = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]], "byte_fallback": False}
REFUSED = {
    "NFC": (changed(normalizer={"type": "NFC"}), "its normalizer is NFC, expected none"),
    "splitting": (changed(pre_tokenizer=LOOSE), "it splits text in a way that GGUF has no name for"),
    "lstrip": (with_added(lstrip=True), r"would become \[.*\]\.\.\., expected \["),
    "merges": (late_merge(), "the merges that make '.*' cannot be expressed"),
    "bytes": (without_bytes(), "it has 255 tokens of single bytes, expected 256"),
    "Unigram": ({"version": "1.0", "added_tokens": [], "model": UNIGRAM}, "is Unigram, expected BPE"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_express(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    home = directory(tmp_path / "in", {"tokenizer.json": content}, 2000)
    with pytest.raises(ValueError, match=message) as caught:
        plan(home, tmp_path / "m.gguf")
    assert str(caught.value).endswith("use --no-tokenizer to leave it out")
    assert "\n" not in str(caught.value)
    plan(home, tmp_path / "m.gguf", tokenizer=False)


@pytest.mark.parametrize(
    ("files", "rows", "message"),
    [
        ({"vocab.json": {"a": 0}}, 40, "found vocab.json, expected tokenizer.json or tokenizer.model"),
        ({"tokenizer.model": b"IQ== 0\n"}, 40, "tokenizer.model is not a SentencePiece model"),
        ({"tokenizer.model": trained_sentencepiece()}, 400, "ids up to 499, expected less than vocab_"),
        ({"tokenizer.json": changed()}, 40, r"ids up to \d+, expected less than vocab_size 40"),
    ],
)  # fmt: skip
def test_files_that_do_not_match_the_model(
    tmp_path: Path, files: Json, rows: int, message: str
) -> None:
    home = directory(tmp_path / "in", files, rows)
    with pytest.raises(ValueError, match=message):
        plan(home, tmp_path / "m.gguf")


def test_splittings_are_told_apart_by_the_trials() -> None:
    # those that random text tells apart, the trials tell apart too
    def cut(pre: Pre, texts: list[str]) -> str:
        return repr([pre_tokenizer_of(pre).pre_tokenize_str(text) for text in texts])

    rng = random.Random(1)
    noise = ["".join(rng.choices("aA1' .\n/é中", k=12)) for _ in range(300)]
    assert len({cut(pre, noise) for pre in SPLITTINGS}) == 6
    assert len({cut(pre, TRIALS[::4]) for pre in SPLITTINGS}) == 6  # Llama 3's is there twice


@pytest.mark.checkpoint
def test_the_real_checkpoint(tmp_path: Path) -> None:
    home = cache_directory() / "SmolLM2-135M-Instruct"
    convert(home, tmp_path / "m.gguf", dtype="bfloat16")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again.gguf")
    first, second = GGUFReader(tmp_path / "m.gguf"), GGUFReader(tmp_path / "again.gguf")
    for one, other in zip(first.tensors, second.tensors, strict=True):
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type)
        assert (one.data == other.data).all()
    original = AutoTokenizer.from_pretrained(home)
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in hard_strings():
        assert back(text).input_ids == original(text).input_ids, repr(text)
    assert back.chat_template == original.chat_template
    written = metadata(tmp_path / "m.gguf")
    source = metadata(cache_directory() / "SmolLM2-135M-Instruct.Q4_1.gguf")
    for key in ("pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert written[f"tokenizer.ggml.{key}"] == source[f"tokenizer.ggml.{key}"], key


def test_tokens_that_only_the_files_beside_have(tmp_path: Path) -> None:
    rows = byte_level()[1]
    files = {
        "tokenizer.json": json.loads(byte_level()[0]),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {"pad_token": "<|late|>"},
        "added_tokens.json": {"early one": rows, "<|late|>": rows + 1},
    }
    home = directory(tmp_path / "in", files, rows + 3)
    convert(home, tmp_path / "m.gguf")
    written = metadata(tmp_path / "m.gguf")
    assert written["tokenizer.ggml.tokens"][rows:] == ["early one", "<|late|>", f"[PAD{rows + 2}]"]
    assert written["tokenizer.ggml.token_type"][rows:] == [USER_DEFINED, CONTROL, UNUSED]
    assert written["tokenizer.ggml.padding_token_id"] == rows + 1
