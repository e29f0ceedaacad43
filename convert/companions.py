"""The files beside a model's weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.files.foreign_weights import POINTER, is_pointer
from llama_jax.text.companions import TEMPLATES, companion_files, tokenizer_home
from llama_jax.text.tokenizers_errors import tokenizers_errors

_MAX_BYTES = 256 * 2**20  # the largest tokenizers have 20 MB


def read_companions(directory: Path, *, tokenizer: bool) -> dict[str, bytes]:
    """The files beside the weights in a model's directory, or a run's, by name.

    Args:
        tokenizer: whether to read the tokenizer's files.

    Raises:
        ValueError: one that is damaged, too large, or a link out of the directory.
    """
    if tokenizer:
        require_inside(tokenizer_home(directory), TEMPLATES)
    files: dict[str, bytes] = {}
    for name, path in companion_files(directory, tokenizer=tokenizer).items():
        require_inside(path.parent if path.name == name else path.parents[1], name)
        if not path.is_file():
            raise ValueError(f"{path}: not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {_MAX_BYTES}")
        files[name] = path.read_bytes()
        if name.endswith(".json"):
            _require_json_object(path, files[name])
    if "tokenizer.json" in files:
        _require_tokenizer(directory / "tokenizer.json", files["tokenizer.json"])
    return files


def write_companions(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name, in subdirectories where the name has one."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def tokenizer_facts(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What `info` shows of the tokenizer in `files`; {} where there is none.

    Raises:
        ValueError: files that no command could use.
    """
    from llama_jax.text.chat_template import chat_templates
    from llama_jax.text.tokenizer import read_tokenizer, special_tokens

    if not files.keys() & {"tokenizer.json", "tokenizer.model"}:
        return {}
    try:
        tokenizer, named = read_tokenizer(files), special_tokens(files)
        templates = chat_templates(files)
    except ValueError as error:
        raise ValueError(f"tokenizer: cannot be read ({error})") from None
    facts: dict[str, Any] = {
        "model": type(tokenizer.model).__name__,
        "tokens": tokenizer.get_vocab_size(),
    }
    facts |= {
        key: named[key]
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if key in named
    }
    return {"tokenizer": facts | {"chat_template": bool(templates)}}


def largest_token_id(files: Mapping[str, bytes]) -> int | None:
    """The largest id that the tokenizer in `files` gives; None where there is none.

    Raises:
        ValueError: a tokenizer that cannot be read.
    """
    from llama_jax.text.tokenizer import read_tokenizer

    if not files.keys() & {"tokenizer.json", "tokenizer.model"}:
        return None
    try:
        vocabulary = read_tokenizer(files).get_vocab(with_added_tokens=True)
    except ValueError as error:
        raise ValueError(f"tokenizer: cannot be read ({error})") from None
    return max(vocabulary.values(), default=None)


def require_inside(directory: Path, name: str) -> None:
    """Raise ValueError if `name` is a link that leaves its directory.

    The cache of huggingface_hub may: its `snapshots/REVISION/` links into the `blobs/` beside.
    """
    path = directory / name
    if not path.is_symlink():
        return
    home, target = directory.resolve(), path.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(f"{path}: a link to {target}, expected it to stay within {home}")


def _require_json_object(path: Path, content: bytes) -> None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        problem = POINTER if is_pointer(content) else f"not valid JSON ({error})"
        raise ValueError(f"{path}: {problem}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a {type(value).__name__}, expected a JSON object")


def _require_tokenizer(path: Path, content: bytes) -> None:
    from tokenizers import Tokenizer

    try:
        with tokenizers_errors():
            Tokenizer.from_buffer(content)
    except ValueError as error:
        raise ValueError(
            f"{path}: not a tokenizer ({error}); use --no-tokenizer to leave it out"
        ) from None
