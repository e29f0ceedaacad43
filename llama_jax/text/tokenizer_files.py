"""The JSON files of a tokenizer, read as transformers 5 reads them.

Besides the vocabulary (`tokenizer.json` or `tokenizer.model`), `tokenizer_config.json` decides special
tokens, added tokens and how text is prepared; in directories written before transformers 4.34 so do
`special_tokens_map.json` and `added_tokens.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from llama_jax.files.remote import is_remote
from llama_jax.text.companions import TEMPLATES, TOKENIZER_FILES
from llama_jax.text.tokenizer_json import Json

VOCABULARY, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
SPECIAL_MAP, ADDED, TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
_FILES = (*TOKENIZER_FILES, "config.json", "params.json")
STANDARD = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
NAMED = tuple(f"{name}_token" for name in STANDARD)
LLAMA, CODE_LLAMA = "LlamaTokenizer", "CodeLlamaTokenizer"
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CODE_LLAMA_TOKENS = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
_END = "<|endoftext|>"
_DEFAULTS: dict[str, dict[str, str]] = {
    LLAMA: _LLAMA_TOKENS,
    CODE_LLAMA: _LLAMA_TOKENS | _CODE_LLAMA_TOKENS,
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
}


class Token(NamedTuple):
    """A token that is matched in the text as a unit; the fields of `tokenizers.AddedToken`."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class Settings(NamedTuple):
    """What the files beside a vocabulary say about it.

    Attributes:
        tokenizer_class: the class in transformers; "" for one that uses tokenizer.json unchanged.
        named: special tokens by name: bos_token and the like, and those of this model alone.
        extra: special tokens without a name; None if tokenizer_config.json does not mention them.
        legacy_extra: those of the older special_tokens_map.json, used if nothing else has any.
        added: tokens to add to the vocabulary, in order of their ids.
        added_by_id: the text of each of those.
        absent: names of special tokens that the files set to null.
        add_bos, add_eos: whether a text gets them; None leaves it to the vocabulary file.
        legacy: also put a space before the text after each special token.
        prefix_space: put a space before the text.
        split_special: encode special tokens in a text as text.
    """

    tokenizer_class: str
    named: dict[str, str | Token]
    extra: list[str | Token] | None
    legacy_extra: list[str | Token]
    added: list[Token]
    added_by_id: dict[int, str]
    absent: frozenset[str]
    add_bos: bool | None
    add_eos: bool | None
    legacy: bool
    prefix_space: bool
    split_special: bool


def read_files(directory: str | Path) -> dict[str, bytes]:
    """The files of a tokenizer and its chat templates: content by relative path.

    Raises:
        ValueError: a file cannot be read.
    """
    directory = cast(Path, directory) if is_remote(directory) else Path(directory)
    paths = [directory / name for name in _FILES]
    paths += sorted((directory / TEMPLATES).glob("*.jinja"))
    files = {}
    for path in paths:
        if path.is_file():
            try:
                files[path.relative_to(directory).as_posix()] = path.read_bytes()
            except OSError as error:
                raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return files


def json_file(files: Mapping[str, bytes], name: str) -> Json:
    """The JSON object in a file; {} without the file. Raises ValueError for any other content."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: found a JSON {type(value).__name__}, expected an object")
    return value


def is_bare(files: Mapping[str, bytes]) -> bool:
    """Whether there is a tokenizer.model without Hugging Face's files.

    A tokenizer_config.json with no more than add_bos_token and add_eos_token may be present.
    """
    permitted = {"add_bos_token", "add_eos_token"}
    return (
        MODEL in files
        and not files.keys() & {VOCABULARY, SPECIAL_MAP, ADDED}
        and json_file(files, CONFIG).keys() <= permitted
    )


def read_settings(files: Mapping[str, bytes]) -> Settings:
    """Read the JSON files. Raises ValueError for impossible values."""
    options = json_file(files, CONFIG)
    tokenizer_class = _tokenizer_class(files, options)
    flags = {
        name: _flag(options, name)
        for name in ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space")
    }
    # a tokenizer.json has a post-processor of its own
    use_flags = VOCABULARY not in files
    add_bos, add_eos = (
        bool(flags[name]) if use_flags and name in options else None
        for name in ("add_bos_token", "add_eos_token")
    )
    if tokenizer_class == CODE_LLAMA and add_bos is None:
        add_bos = True

    values = {
        name: _token(CONFIG, name, value)
        for name, value in options.items()
        if name in NAMED or (name.endswith("_token") and _is_token(value))
    }
    extra_name, model_specific = "extra_special_tokens", {}
    if "additional_special_tokens" in options and not options.get(extra_name):
        extra_name = "additional_special_tokens"
    value = options.get(extra_name)
    if isinstance(value, dict):
        model_specific = {name: _token(CONFIG, name, token) for name, token in value.items()}
    listed = extra_name in options and not isinstance(value, dict)
    extra = _tokens(CONFIG, extra_name, value) if listed else None
    legacy_extra: list[str | Token] = []

    decoder = options.get("added_tokens_decoder")
    if decoder is not None:
        by_id = _from_decoder(decoder)
    else:
        for name, value in json_file(files, SPECIAL_MAP).items():
            if name == "extra_special_tokens" and isinstance(value, dict):
                model_specific |= {
                    key: _token(SPECIAL_MAP, key, token) for key, token in value.items()
                }
            elif name == "extra_special_tokens":
                extra = list(dict.fromkeys([*(extra or []), *_tokens(SPECIAL_MAP, name, value)]))
            elif name == "additional_special_tokens":
                legacy_extra = _tokens(SPECIAL_MAP, name, value)
            elif name in NAMED or (name.endswith("_token") and _is_token(value)):
                values[name] = _token(SPECIAL_MAP, name, value, special=True)
        special = [*(values.get(name) for name in NAMED), *(extra or [])]
        by_id = _from_added_tokens(files, {str_of(token) for token in special if token})
        by_id |= _from_vocabulary(files)
    texts = {token.content: token for token in by_id.values()}
    values = {
        name: texts.get(str_of(value), value) if value is not None and name in NAMED else value
        for name, value in values.items()
    }
    named = {**_DEFAULTS.get(tokenizer_class, {}), **values, **model_specific}
    return Settings(
        tokenizer_class=tokenizer_class,
        named={name: token for name, token in named.items() if token is not None},
        extra=extra,
        legacy_extra=legacy_extra,
        added=[by_id[i] for i in sorted(by_id)],
        added_by_id={i: token.content for i, token in by_id.items()},
        absent=frozenset(name for name, value in named.items() if value is None),
        add_bos=add_bos,
        add_eos=add_eos,
        legacy=bool(flags["legacy"]),
        prefix_space=flags["add_prefix_space"] is not False,
        split_special=bool(_flag(options, "split_special_tokens")),
    )


def str_of(token: str | Token) -> str:
    """The text of a token."""
    return token.content if isinstance(token, Token) else token


def _tokenizer_class(files: Mapping[str, bytes], options: Json) -> str:
    name = options.get("tokenizer_class")
    if name is None:
        try:
            name = json_file(files, "config.json").get("tokenizer_class")
        except ValueError:  # reported by whoever reads the model's config
            return ""
    if name is None:
        return ""
    if not isinstance(name, str):
        raise ValueError(f"{CONFIG}: tokenizer_class: found {name!r}, expected the name of a class")
    name = name.removesuffix("Fast")
    # some Llama 3 directories name Llama 2's class
    if name == LLAMA and b'"ByteLevel"' in files.get(VOCABULARY, b""):
        return ""
    return name if name in _DEFAULTS else ""


def _flag(options: Json, name: str) -> bool | None:
    value = options.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{CONFIG}: {name}: found {value!r}, expected true or false")
    return value


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _token(file: str, name: str, value: Any, **flags: bool) -> str | Token | None:
    """A token in JSON: its text, or an object with its text and flags."""
    if value is None or isinstance(value, str):
        return value
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str):
        raise ValueError(f"{file}: {name}: found {_short(value)}, expected a token's text")
    known = {key: value[key] for key in Token._fields if key in value} | flags
    for key, flag in known.items():
        if key != "content" and not isinstance(flag, bool):
            raise ValueError(f"{file}: {name}: {key}: found {_short(flag)}, expected true or false")
    return Token(**({"normalized": not known.get("special", False)} | known))


def _tokens(file: str, name: str, value: Any) -> list[str | Token]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{file}: {name}: found {_short(value)}, expected a list of tokens")
    tokens = [_token(file, name, entry) for entry in value]
    return [token for token in tokens if token is not None]


def _from_decoder(decoder: Any) -> dict[int, Token]:
    """Added tokens by id: `added_tokens_decoder` of tokenizer_config.json."""
    name = "added_tokens_decoder"
    if not isinstance(decoder, dict):
        raise ValueError(f"{CONFIG}: {name}: found {_short(decoder)}, expected tokens by id")
    tokens = {}
    for i, value in decoder.items():
        token = _token(CONFIG, f"{name}: {i}", value)
        if not i.isdecimal() or token is None:
            raise ValueError(f"{CONFIG}: {name}: found {i!r}, expected tokens by id")
        # transformers only accepts objects here
        tokens[int(i)] = token if isinstance(token, Token) else Token(token)
    return tokens


def _from_added_tokens(files: Mapping[str, bytes], special: set[str]) -> dict[int, Token]:
    """Added tokens by id: added_tokens.json."""
    tokens = {}
    for text, i in json_file(files, ADDED).items():
        if type(i) is not int or i < 0:
            raise ValueError(f"{ADDED}: {text!r}: found {_short(i)}, expected an id")
        tokens[i] = Token(text, normalized=text not in special, special=text in special)
    return tokens


def _from_vocabulary(files: Mapping[str, bytes]) -> dict[int, Token]:
    """Added tokens by id: `added_tokens` of tokenizer.json."""
    entries = json_file(files, VOCABULARY).get("added_tokens") or []
    if not isinstance(entries, list):
        raise ValueError(f"{VOCABULARY}: added_tokens: found {_short(entries)}, expected a list")
    tokens = {}
    for entry in entries:
        token = _token(VOCABULARY, "added_tokens", entry)
        if not isinstance(token, Token) or type(entry.get("id")) is not int:
            raise ValueError(f"{VOCABULARY}: added_tokens: found {_short(entry)}, expected a token")
        tokens[entry["id"]] = token
    return tokens


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
