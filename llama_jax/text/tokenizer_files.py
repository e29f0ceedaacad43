"""The files of a tokenizer's directory, and what the JSON among them say, read as transformers 5 reads it.

A tokenizer is all of its files. Besides the vocabulary (`tokenizer.json` or `tokenizer.model`) the special
tokens, the tokens added later and the way text is prepared stand in `tokenizer_config.json`, and in
directories written before transformers 4.34 in `special_tokens_map.json` and `added_tokens.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.text.companions import TEMPLATES, TOKENIZER_FILES
from llama_jax.text.tokenizer_json import Json

VOCABULARY, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
SPECIAL_MAP, ADDED, TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
_NAMES = (*TOKENIZER_FILES, "config.json", "params.json")
STANDARD = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
NAMED = tuple(f"{name}_token" for name in STANDARD)
LLAMA, CODE_LLAMA = "LlamaTokenizer", "CodeLlamaTokenizer"
_LLAMAS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CODE_LLAMAS = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
_END = "<|endoftext|>"
_DEFAULTS: dict[str, dict[str, str]] = {
    LLAMA: _LLAMAS,
    CODE_LLAMA: _LLAMAS | _CODE_LLAMAS,
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
}


class Token(NamedTuple):
    """A token that is matched whole in the text, as `tokenizers.AddedToken`."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class Settings(NamedTuple):
    """What stands beside a vocabulary."""

    kind: str
    """The class that transformers makes of it; "" for one that takes tokenizer.json as it is."""
    named: dict[str, str | Token]
    """Special tokens by name: bos_token and the like, and those that only this model has."""
    extra: list[str | Token] | None
    """Special tokens without a name; None where tokenizer_config.json does not speak of them."""
    otherwise: list[str | Token]
    """Those that the older special_tokens_map.json has, which count where nothing else has any."""
    added: list[Token]
    """Tokens to add to the vocabulary, in order."""
    placed: dict[int, str]
    """The text of each token that has a place in the files: `added` by id."""
    unnamed: frozenset[str]
    """Names of special tokens that the files say are absent."""
    add_bos: bool | None
    add_eos: bool | None
    legacy: bool
    """Whether a space goes before the text after each special token too."""
    prefix_space: bool
    split_special: bool
    """Whether special tokens in a text are text."""


def read_files(directory: str | Path) -> dict[str, bytes]:
    """The files of a directory that a tokenizer and its chat templates consist of, by relative path.

    Raises:
        ValueError: one that cannot be read.
    """
    directory = Path(directory)
    paths = [directory / name for name in _NAMES]
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
    """The object in a file; {} where there is none. Raises ValueError for anything else."""
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
    """Whether there is a tokenizer.model as its maker published it, without Hugging Face's files.

    A tokenizer_config.json that says nothing but what goes around a text may lie beside it.
    """
    around = {"add_bos_token", "add_eos_token"}
    return (
        MODEL in files
        and not files.keys() & {VOCABULARY, SPECIAL_MAP, ADDED}
        and json_file(files, CONFIG).keys() <= around
    )


def read_settings(files: Mapping[str, bytes]) -> Settings:
    """What the JSON files say. Raises ValueError for values that no tokenizer has."""
    options = json_file(files, CONFIG)
    kind = _kind(files, options)
    flags = {
        name: _flag(options, name)
        for name in ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space")
    }
    # a tokenizer.json says itself what goes around a text
    keep = VOCABULARY not in files
    add_bos, add_eos = (
        bool(flags[name]) if keep and name in options else None
        for name in ("add_bos_token", "add_eos_token")
    )
    if kind == CODE_LLAMA and add_bos is None:
        add_bos = True

    values = {
        name: _token(CONFIG, name, value)
        for name, value in options.items()
        if name in NAMED or (name.endswith("_token") and _is_token(value))
    }
    extra_name, own = "extra_special_tokens", {}
    if "additional_special_tokens" in options and not options.get(extra_name):
        extra_name = "additional_special_tokens"
    value = options.get(extra_name)
    if isinstance(value, dict):
        own = {name: _token(CONFIG, name, each) for name, each in value.items()}
    listed = extra_name in options and not isinstance(value, dict)
    extra = _tokens(CONFIG, extra_name, value) if listed else None
    otherwise: list[str | Token] = []

    placed = options.get("added_tokens_decoder")
    if placed is not None:
        by_id = _by_id(placed)
    else:
        for name, value in json_file(files, SPECIAL_MAP).items():
            if name == "extra_special_tokens" and isinstance(value, dict):
                own |= {key: _token(SPECIAL_MAP, key, each) for key, each in value.items()}
            elif name == "extra_special_tokens":
                extra = list(dict.fromkeys([*(extra or []), *_tokens(SPECIAL_MAP, name, value)]))
            elif name == "additional_special_tokens":
                otherwise = _tokens(SPECIAL_MAP, name, value)
            elif name in NAMED or (name.endswith("_token") and _is_token(value)):
                values[name] = _token(SPECIAL_MAP, name, value, special=True)
        special = [*(values.get(name) for name in NAMED), *(extra or [])]
        by_id = _numbered(files, {str_of(token) for token in special if token})
        by_id |= _added_tokens(files)
    texts = {token.content: token for token in by_id.values()}
    values = {
        name: texts.get(str_of(value), value) if value is not None and name in NAMED else value
        for name, value in values.items()
    }
    named = {**_DEFAULTS.get(kind, {}), **values, **own}
    return Settings(
        kind=kind,
        named={name: token for name, token in named.items() if token is not None},
        extra=extra,
        otherwise=otherwise,
        added=[by_id[i] for i in sorted(by_id)],
        placed={i: token.content for i, token in by_id.items()},
        unnamed=frozenset(name for name, value in named.items() if value is None),
        add_bos=add_bos,
        add_eos=add_eos,
        legacy=bool(flags["legacy"]),
        prefix_space=flags["add_prefix_space"] is not False,
        split_special=bool(_flag(options, "split_special_tokens")),
    )


def str_of(token: str | Token) -> str:
    """The text of a token."""
    return token.content if isinstance(token, Token) else token


def _kind(files: Mapping[str, bytes], options: Json) -> str:
    name = options.get("tokenizer_class")
    if name is None:
        try:
            name = json_file(files, "config.json").get("tokenizer_class")
        except ValueError:  # the model's, whose reader says it
            return ""
    if name is None:
        return ""
    if not isinstance(name, str):
        raise ValueError(f"{CONFIG}: tokenizer_class: found {name!r}, expected the name of a class")
    name = name.removesuffix("Fast")
    # some directories of Llama 3 name the class of Llama 2
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
    """A token as files have them: its text, or an object of its text and flags."""
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
    found = [_token(file, name, each) for each in value]
    return [token for token in found if token is not None]


def _by_id(placed: Any) -> dict[int, Token]:
    where = "added_tokens_decoder"
    if not isinstance(placed, dict):
        raise ValueError(f"{CONFIG}: {where}: found {_short(placed)}, expected tokens by id")
    found = {}
    for i, value in placed.items():
        token = _token(CONFIG, f"{where}: {i}", value)
        if not i.isdecimal() or token is None:
            raise ValueError(f"{CONFIG}: {where}: found {i!r}, expected tokens by id")
        # transformers has objects only
        found[int(i)] = token if isinstance(token, Token) else Token(token)
    return found


def _numbered(files: Mapping[str, bytes], special: set[str]) -> dict[int, Token]:
    found = {}
    for text, i in json_file(files, ADDED).items():
        if type(i) is not int or i < 0:
            raise ValueError(f"{ADDED}: {text!r}: found {_short(i)}, expected an id")
        found[i] = Token(text, normalized=text not in special, special=text in special)
    return found


def _added_tokens(files: Mapping[str, bytes]) -> dict[int, Token]:
    """Those of a tokenizer.json, by id."""
    found = json_file(files, VOCABULARY).get("added_tokens") or []
    if not isinstance(found, list):
        raise ValueError(f"{VOCABULARY}: added_tokens: found {_short(found)}, expected a list")
    tokens = {}
    for value in found:
        token = _token(VOCABULARY, "added_tokens", value)
        if not isinstance(token, Token) or type(value.get("id")) is not int:
            raise ValueError(f"{VOCABULARY}: added_tokens: found {_short(value)}, expected a token")
        tokens[value["id"]] = token
    return tokens


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
