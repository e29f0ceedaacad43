"""The tokens that begin and end a text: determined when text is tokenized, and kept in the index."""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from llama_jax.files.json_object import read_json_object
from llama_jax.text.tokenizer import special_tokens
from llama_jax.text.tokenizer_files import read_files

_COMMON_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
_COMMON_BOS = ("<s>", "<|begin_of_text|>", "<bos>")


class SpecialIds(NamedTuple):
    """A tokenizer's beginning- and end-of-text ids; at least one is not None."""

    bos_id: int | None
    eos_id: int | None


def special_ids(encoder: Tokenizer, beside: Path, eos: str | None = None) -> SpecialIds:
    """The beginning-of-text and end-of-text tokens of a tokenizer.

    They are taken from the files beside the tokenizer; the beginning token also from what the tokenizer
    puts before a text. If nothing names an end token, a common one in the vocabulary is used; if there is
    none, a common beginning token.

    Args:
        encoder: the tokenizer.
        beside: the directory it comes from.
        eos: the end-of-text token, overriding the files.

    Raises:
        ValueError: there is neither; `eos` is not in the vocabulary; a file is not a JSON object.
    """
    if eos is not None and encoder.token_to_id(eos) is None:
        raise ValueError(f"--eos: found {eos!r}, expected a token of the tokenizer")
    try:
        named = special_tokens(read_files(beside))
    except ValueError as error:
        raise ValueError(f"{beside}: {error}") from None
    end_text = named.get("eos_token") if eos is None else eos
    end = _id_of(encoder, [end_text, _configured_id(beside, "eos"), *_COMMON_EOS])
    begin = _id_of(encoder, [named.get("bos_token"), _configured_id(beside, "bos")])
    if begin is None:
        begin = _added_before(encoder, end)
    if begin is None and end is None:
        begin = _id_of(encoder, _COMMON_BOS)
    if begin is None and end is None:
        raise ValueError(
            f"{beside}: no file names the end-of-text token, and the vocabulary has none of the common "
            "ones; name it with --eos"
        )
    return SpecialIds(begin, end)


def model_ids(ids: SpecialIds) -> dict[str, int | None]:
    """`bos_token_id` and `eos_token_id` of a model with such a tokenizer.

    If one is missing it is set to the other, as in GPT-2: other programs refuse a model without them.
    """
    begin, end = ids
    return {
        "bos_token_id": end if begin is None else begin,
        "eos_token_id": begin if end is None else end,
    }


def _id_of(encoder: Tokenizer, candidates: Any) -> int | None:
    """The first candidate, a text or an id, that is in the vocabulary."""
    for token in candidates:
        if isinstance(token, str) and (token_id := encoder.token_to_id(token)) is not None:
            return token_id
        if type(token) is int and token >= 0 and encoder.id_to_token(token) is not None:
            return token
    return None


def _added_before(encoder: Tokenizer, end: int | None) -> int | None:
    """The special token that the tokenizer puts before a text."""
    encoding = encoder.encode("a")
    first = encoding.ids[0] if encoding.special_tokens_mask[:1] == [1] else None
    return None if first == end else first


def _configured_id(directory: Path, kind: str) -> Any:
    """The token id in the model's configuration files."""
    return _first(directory, ("generation_config.json", "config.json"), f"{kind}_token_id")


def _first(directory: Path, names: tuple[str, ...], key: str) -> Any:
    """The value of the key in the first file that has it; of a list the first element."""
    for name in names:
        if not (directory / name).is_file():
            continue
        value = read_json_object(directory / name).get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            return value
    return None
