"""Builders for the parts of a `tokenizer.json` (huggingface/tokenizers)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]


def tokenizer_json(
    *,
    model: Json,
    added_tokens: Iterable[Json],
    decoder: Json | None,
    normalizer: Json | None = None,
    pre_tokenizer: Json | None = None,
    post_processor: Json | None = None,
) -> Json:
    """The content of a complete file."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def added_token(i: int, content: str, *, special: bool, normalized: bool = False) -> Json:
    """A token that is matched before the text is normalized or, with `normalized`, afterwards."""
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip"], False)
    return {"id": i, "content": content, **flags, "normalized": normalized, "special": special}


def bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> Json:
    """A byte-pair model: merges are applied in the order of the list."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": dict(vocab),
        "merges": list(merges),
    }


def template(before: Sequence[str], after: Sequence[str], ids: Mapping[str, int]) -> Json | None:
    """A post-processor that puts tokens around one text or each of two; None if there are no tokens."""
    if not before and not after:
        return None

    def around(sequence: str, type_id: int) -> list[Json]:
        def special(names: Sequence[str]) -> list[Json]:
            return [{"SpecialToken": {"id": name, "type_id": type_id}} for name in names]

        middle = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        return special(before) + middle + special(after)

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in [*before, *after]
        },
    }
