"""The tokens that begin and end a text: found once, when text is tokenized, and kept in the index."""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from llama_jax.files.json_object import read_json_object
from llama_jax.text.tokenizer import special_tokens
from llama_jax.text.tokenizer_files import read_files

_COMMON_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
_COMMON_BOS = ("<s>", "<|begin_of_text|>", "<bos>")


class SpecialIds(NamedTuple):
    """The ids of a tokenizer; None for what it has not. One of them at least is there."""

    bos_id: int | None
    eos_id: int | None


def special_ids(encoder: Tokenizer, beside: Path, eos: str | None = None) -> SpecialIds:
    """The beginning-of-text and end-of-text tokens of a tokenizer.

    Each is what the files beside it say; the beginning also what the tokenizer puts before a text. A
    common name is believed where nothing is said of the end, and of the beginning where there is no end.

    Args:
        encoder: the tokenizer.
        beside: the directory it comes from.
        eos: the end-of-text token, whatever the files say.

    Raises:
        ValueError: neither is found; `eos` is no token; a file beside is not a JSON object.
    """
    if eos is not None and encoder.token_to_id(eos) is None:
        raise ValueError(f"--eos: found {eos!r}, expected a token of the tokenizer")
    try:
        said = special_tokens(read_files(beside))
    except ValueError as error:
        raise ValueError(f"{beside}: {error}") from None
    end_text = said.get("eos_token") if eos is None else eos
    end = _id_of(encoder, [end_text, _said_id(beside, "eos"), *_COMMON_EOS])
    begin = _id_of(encoder, [said.get("bos_token"), _said_id(beside, "bos")])
    if begin is None:
        begin = _added_before(encoder, end)
    if begin is None and end is None:
        begin = _id_of(encoder, _COMMON_BOS)
    if begin is None and end is None:
        raise ValueError(
            f"{beside}: found no end-of-text token beside the tokenizer nor a common one in it, "
            "expected --eos"
        )
    return SpecialIds(begin, end)


def model_ids(found: SpecialIds) -> dict[str, int | None]:
    """`bos_token_id` and `eos_token_id` of a model of such a tokenizer.

    Where one is missing it is the other, as in GPT-2: other programs refuse a model without them.
    """
    begin, end = found
    return {
        "bos_token_id": end if begin is None else begin,
        "eos_token_id": begin if end is None else end,
    }


def _id_of(encoder: Tokenizer, candidates: Any) -> int | None:
    """The first of the candidates, texts and ids, that is a token."""
    for token in candidates:
        if isinstance(token, str) and (found := encoder.token_to_id(token)) is not None:
            return found
        if type(token) is int and token >= 0 and encoder.id_to_token(token) is not None:
            return token
    return None


def _added_before(encoder: Tokenizer, end: int | None) -> int | None:
    """What the tokenizer puts before a text."""
    encoding = encoder.encode("a")
    first = encoding.ids[0] if encoding.special_tokens_mask[:1] == [1] else None
    return None if first == end else first


def _said_id(directory: Path, kind: str) -> Any:
    """The token's id."""
    return _first(directory, ("generation_config.json", "config.json"), f"{kind}_token_id")


def _first(directory: Path, names: tuple[str, ...], key: str) -> Any:
    """What the first of the files that has the key says; the first of several tokens."""
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
