"""Which tokens end a generation in llama.cpp: those that a key names, and those it knows by their text.

Facts of its `llama-vocab.cpp`: files seldom name every end token, so the vocabulary is searched for those
of the chat formats it knows, whatever the tokens' types are, and each match counts as a control token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>"),
        *("<end_of_turn>", "<turn|>", "<|tool_response>", "<end_of_utterance>"),
        *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "</s>"),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
    }
)
# of models that fill in the middle, where no key names one: the first of these texts
_INFILL_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids of all tokens at which llama.cpp ends: eos, eot and eom first, then by text."""
    named = {
        name: metadata.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("eos", "eot", "eom", *_INFILL_TEXTS)
    }
    by_key = (named["eos"], named["eot"], named["eom"])
    ids: list[int] = [token_id for token_id in by_key if type(token_id) is int]
    return list(dict.fromkeys([*ids, *ends_by_text(_tokens(metadata), named)]))


def ends_by_text(tokens: Sequence[str], named: Mapping[str, Any] | None = None) -> list[int]:
    """The ids of the tokens whose text is that of an end token, in order.

    Args:
        named: ids that keys name: `fim_pad`, `fim_rep` and `fim_sep` are not searched for where they do.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    texts = _END_TEXTS & ids.keys()
    # where a message ends otherwise, <|end|> and </s> stand within it
    calls = {"<|call|>", "<|calls|>"} & texts
    if ("<|return|>" in texts and "<|call|>" in texts) or (calls and "<|flush|>" in texts):
        texts -= {"<|end|>"}
    if "<|tool_response>" in texts:
        texts -= {"</s>"}
    ends = {ids[text] for text in texts}
    for name, candidates in _INFILL_TEXTS.items():
        infill = (named or {}).get(name)
        if type(infill) is not int:
            infill = min((ids[text] for text in candidates if text in ids), default=None)
        if infill is not None:
            ends.add(infill)
    return sorted(ends)


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, list) and all(type(t) is str for t in tokens) else []
