"""Which tokens end a generation in llama.cpp: those that a key names, and those it knows by their text.

Facts of its `llama-vocab.cpp`: files seldom name every end, so the vocabulary is searched for the ends of
the chat formats it knows, whatever the tokens' types are, and what is found counts as a control token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_BY_TEXT = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>"),
        *("<end_of_turn>", "<turn|>", "<|tool_response>", "<end_of_utterance>"),
        *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "</s>"),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
    }
)
# of models that fill in the middle, where no key names one: the first of these texts
_FILLING = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_KEYS = ("eos", "eot", "eom", *_FILLING)


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids of all tokens at which llama.cpp ends: eos, eot and eom first, then by text."""
    tokens = _tokens(metadata)
    named = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _KEYS}
    found = [named[name] for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(i for i in found if type(i) is int)) + [
        i for i in ends_by_text(tokens, named) if i not in found
    ]


def ends_by_text(tokens: Sequence[str], named: Mapping[str, Any] | None = None) -> list[int]:
    """The ids of the tokens whose text is that of an end, in order.

    Args:
        named: the ids that keys name, which make a search for theirs unnecessary.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    texts = _BY_TEXT & ids.keys()
    # where a message ends otherwise, <|end|> and </s> stand within it
    calls = {"<|call|>", "<|calls|>"} & texts
    if ("<|return|>" in texts and "<|call|>" in texts) or (calls and "<|flush|>" in texts):
        texts -= {"<|end|>"}
    if "<|tool_response>" in texts:
        texts -= {"</s>"}
    found = {ids[text] for text in texts}
    for name, words in _FILLING.items():
        at = (named or {}).get(name)
        if type(at) is not int:
            at = min((ids[word] for word in words if word in ids), default=None)
        if at is not None:
            found.add(at)
    return sorted(found)


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, list) and all(type(t) is str for t in tokens) else []
