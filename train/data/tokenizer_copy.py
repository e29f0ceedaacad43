"""The tokenizer's files in a token directory."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llama_jax.files.json_object import read_json_object
from llama_jax.files.staging import copy_file, replacing, write_text
from llama_jax.text.companions import companion_files, copy_companions
from train.data.special_ids import SpecialIds, model_ids

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"


def copy_tokenizer(
    tokenizer: Path, tokenizer_json: str, special: SpecialIds, eos: str | None, out: Path
) -> list[str]:
    """Copy the tokenizer's files to `out`, and add what other programs need; returns the names.

    Args:
        tokenizer: a tokenizer.json or tokenizer.model, or the directory that has one.
        tokenizer_json: the tokenizer as JSON.
        special: its special tokens.
        eos: the end-of-text token, if the user named it.
    """
    home = tokenizer.parent if tokenizer.is_file() else tokenizer
    names = copy_companions(home, out, generation=False)
    if tokenizer.suffix == ".model" or not ("tokenizer.json" in names or tokenizer.is_file()):
        write_text(out / "tokenizer.json", tokenizer_json)
    elif tokenizer.is_file():
        copy_file(tokenizer, out / "tokenizer.json")
    if not (out / TOKENIZER_CONFIG).exists():
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        _write_json(out / TOKENIZER_CONFIG, config | _token_names(out, tokenizer_json, special))
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP) if eos is not None else ():
        if (out / name).exists():
            _write_json(out / name, read_json_object(out / name) | {"eos_token": eos})
    return list(companion_files(out, generation=False))


def _token_names(out: Path, tokenizer_json: str, special: SpecialIds) -> dict[str, Any]:
    """The special tokens for a tokenizer_config.json, where the tokenizer has none."""
    path = out / SPECIAL_TOKENS_MAP
    names = read_json_object(path) if path.exists() else {}
    encoder = Tokenizer.from_str(tokenizer_json)
    for name, token in model_ids(special).items():
        assert token is not None
        names[name.removesuffix("_id")] = encoder.id_to_token(token)
    return names


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    with replacing(path) as staged:
        write_text(staged, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
