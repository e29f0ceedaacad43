"""Tokenizer directories as transformers 4.30 to 5 write them for a Llama, and difficult strings."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.text.tokenizer import model_json
from parity_tests.harness.tiny_tokenizers import HARD, sentencepiece_model, tiktoken_model

PLAIN = {"vocab_size": 420}
DEFINED = {"vocab_size": 440, "user_defined_symbols": "<sep>,the,▁▁▁"}
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{{ pad_token }}{{ image_token }}{{ unk_token }}"
)
_PLAIN_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def flags(content: str, **others: bool) -> dict[str, Any]:
    """A token with its flags, as in the files."""
    return {"content": content, **_PLAIN_FLAGS, **others}


def _added(start: int) -> dict[int, dict[str, Any]]:
    tokens = [
        flags("<extra>", normalized=True, special=False),
        flags("foo bar", normalized=True, special=False),
        flags("zz", normalized=True, lstrip=True, rstrip=True, special=False),
        flags("Word", normalized=True, single_word=True, special=False),
        flags("<pad>", special=True),
        flags("<|im_start|>", special=True),
        flags("<|im_end|>", rstrip=True, special=True),
    ]
    return {start + i: token for i, token in enumerate(tokens)}


def _base(**options: Any) -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **options,
    }


_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def slow_4_30(model: dict[str, Any], *, added: bool, **options: Any) -> dict[str, Any]:
    """tokenizer.model, and added tokens in added_tokens.json and special_tokens_map.json."""
    named = {name: flags(token, normalized=True) for name, token in _NAMES.items()}
    config = {name: {"__type": "AddedToken", **token} for name, token in named.items()}
    files: dict[str, Any] = {
        "tokenizer.model": sentencepiece_model(**model),
        "tokenizer_config.json": _base(pad_token=None, **config, **options),
        "special_tokens_map.json": named,
    }
    if added:
        tokens = _added(model["vocab_size"])
        files["added_tokens.json"] = {token["content"]: i for i, token in tokens.items()}
        files["special_tokens_map.json"] = named | {
            "pad_token": "<pad>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        }
        files["tokenizer_config.json"] |= {"image_token": "<|im_start|>", "chat_template": CHAT}
    return files


def slow_4_36(model: dict[str, Any], *, added: bool, **options: Any) -> dict[str, Any]:
    """tokenizer.model, and added tokens in added_tokens_decoder of tokenizer_config.json."""
    decoder = {i: flags(t, special=True) for i, t in enumerate(["<unk>", "<s>", "</s>"])}
    extra = {}
    if added:
        decoder |= _added(model["vocab_size"])
        extra = {"additional_special_tokens": ["<|im_end|>", "<|im_start|>"], "pad_token": "<pad>"}
        extra |= {"chat_template": [{"name": "default", "template": CHAT}], "image_token": "zz"}
    return {
        "tokenizer.model": sentencepiece_model(**model),
        "tokenizer_config.json": _base(
            added_tokens_decoder={str(i): token for i, token in decoder.items()},
            **(_NAMES | extra | options),
        ),
        # ignored, because there is an added_tokens_decoder
        "special_tokens_map.json": {"bos_token": "</s>"},
        "added_tokens.json": {"not this": 999},
    }


def fast_4_36(model: dict[str, Any], *, added: bool, **options: Any) -> dict[str, Any]:
    """The same with a tokenizer.json, which need not contain all added tokens."""
    files = slow_4_36(model, added=added, **options)
    content = model_json(files["tokenizer.model"])
    content["added_tokens"] = [
        {"id": i, **flags(t, special=True)} for i, t in enumerate(["<unk>", "<s>", "</s>"])
    ]
    return files | {"tokenizer.json": content}


def byte_level(*, kind: str, **options: Any) -> dict[str, Any]:
    """Llama 3's: tokenizer.json has everything except tokens that were added later."""
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return {
        "tokenizer.json": model_json(tiktoken_model()),
        "tokenizer_config.json": {"tokenizer_class": kind, **names, **options},
        "chat_template.jinja": CHAT,
    }


_LATE = {
    "738": flags("<late>", special=True),
    "736": flags("early", normalized=True, special=False),
}
_PADDED = model_json(tiktoken_model()) | {
    "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    "padding": {
        "strategy": {"Fixed": 20},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "<padded>",
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{
        f"{make.__name__}-{'defined' if model is DEFINED else 'plain'}-{legacy}-{added}": make(
            model, added=added, **({} if legacy is None else {"legacy": legacy})
        )
        for make in (slow_4_30, slow_4_36, fast_4_36)
        for model, legacy, added in [
            (PLAIN, None, True),
            (PLAIN, True, False),
            (DEFINED, True, True),
            (DEFINED, False, False),
            (DEFINED, False, True),
        ]
    },
    "no prefix": slow_4_36(PLAIN, added=True, add_prefix_space=False),
    "no prefix, fast": fast_4_36(DEFINED, added=False, add_prefix_space=False),
    "eos": slow_4_36(PLAIN, added=False, add_bos_token=False, add_eos_token=True),
    "split": slow_4_36(PLAIN, added=True, split_special_tokens=True),
    "no class": slow_4_36(DEFINED, added=False, tokenizer_class=None),
    "code llama": fast_4_36(PLAIN, added=False, tokenizer_class="CodeLlamaTokenizer"),
    "byte level": byte_level(kind="PreTrainedTokenizerFast", added_tokens_decoder=_LATE),
    "byte level, another class": byte_level(kind="LlamaTokenizerFast", pad_token="<pad>"),
    "byte level, 5": byte_level(
        kind="TokenizersBackend", extra_special_tokens={"image_token": "<image>"}
    ),
    "truncation and padding": byte_level(kind="TokenizersBackend") | {"tokenizer.json": _PADDED},
    "tiktoken": {
        "tokenizer.model": tiktoken_model(),
        "tokenizer_config.json": {
            "tokenizer_class": "TokenizersBackend",
            "added_tokens_decoder": {"480": flags("<|bos|>", special=True), "483": flags("<e>")},
            "bos_token": "<|bos|>",
            "add_bos_token": True,
        },
    },
}


def write_layout(directory: Path, files: dict[str, Any]) -> Path:
    """Write the files, and a config.json of a Llama."""
    directory.mkdir(exist_ok=True)
    for name, content in ({"config.json": {"model_type": "llama"}} | files).items():
        if not isinstance(content, bytes):
            text = content if isinstance(content, str) else json.dumps(content)
            content = text.encode()
        (directory / name).write_bytes(content)
    return directory


def hard_strings(count: int) -> Iterator[str]:
    """The same strings every time: tokens in text, any Unicode, runs, near misses of tokens."""
    tokens = ["<sep>", "▁▁▁", "<extra>", "foo bar", "zz", " zz ", "Word", "Words", "<pad>", "other"]
    tokens += ["<|im_start|>", "<|im_end|> ", "<s>", "</s>", "<unk>", "<late>", "early", "<image>"]
    choices, rng = [*HARD, *tokens, "the<sep>other"], random.Random(0)
    for i in range(count):
        size = rng.randrange(1, 7)
        if i < len(choices):
            yield choices[i]
        elif i % 4 < 2:
            yield (" " * (i % 2)).join(rng.choice(choices) for _ in range(size))
        elif i % 4 == 2:
            ranges = [(0, 0xD800), (0xE000, 0x110000), (0, 128), (0x300, 0x370)]
            yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(4 * size))
        else:
            yield "".join(rng.choice("thera ▁ns'\n1ab<sep>") for _ in range(6 * size))
