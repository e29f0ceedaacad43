"""Text to token ids and back, by the checkpoint's own tokenizer in whichever form it has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.config import read_json_object
from llama_jax.tokenizer_json import Json
from llama_jax.tokenizer_sentencepiece import sentencepiece_json
from llama_jax.tokenizer_tiktoken import is_tiktoken, tiktoken_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a directory, or of the file itself: `tokenizer.json`, or else `tokenizer.model`.

    A `tokenizer.model` of SentencePiece's or tiktoken's form is made into what `tokenizers` runs, with the
    ids of the form's own library. Special tokens in the text are matched, as Hugging Face does; with
    `encode_special_tokens` set on the result they are text. What goes around a text a tokenizer.json says
    itself, as in transformers 5; for a tokenizer.model, `add_bos_token` and `add_eos_token` of a
    tokenizer_config.json beside say it, or else it is bos alone.

    Raises:
        ValueError: no such file, one that is damaged or of another kind, or tokenizers not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(
            "tokenizers is not installed, expected the extra: pip install 'llama-jax[generate]'"
        ) from None
    path = Path(directory)
    if not path.is_file():
        path /= "tokenizer.json"
        if not path.is_file() and path.with_suffix(".model").is_file():
            path = path.with_suffix(".model")
    if not path.is_file():
        raise ValueError(f"{path}: not found, expected the checkpoint's tokenizer")
    if path.suffix == ".model":
        beside = path.with_name("tokenizer_config.json")
        options = read_json_object(beside) if beside.is_file() else {}
        add = {
            name: options[f"{name}_token"]
            for name in ("add_bos", "add_eos")
            if isinstance(options.get(f"{name}_token"), bool)
        }
        try:
            content = model_json(path.read_bytes(), **add)
        except ValueError as error:
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        return Tokenizer.from_str(json.dumps(content))
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise ValueError(f"{path}: not a tokenizer ({error})") from None


def model_json(content: bytes, *, add_bos: bool = True, add_eos: bool = False) -> Json:
    """The tokenizer.json of a `tokenizer.model`, of whichever form. Raises ValueError for neither."""
    convert = tiktoken_json if is_tiktoken(content) else sentencepiece_json
    return convert(content, add_bos=add_bos, add_eos=add_eos)
