"""A README.md's front matter: what a model is called, its license and its languages."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.metadata import Metadata

from convert.companions import require_inside
from llama_jax.files.download import on_disk

FILE = "README.md"
# the facts of a checkpoint, and what the front matter calls them
_KEYS = {
    "name": ("model_name", "name"),
    "license": ("license",),
    "license_name": ("license_name",),
    "license_link": ("license_link",),
    "languages": ("language", "languages"),
}
_MAX_BYTES = 2**22


def card_facts(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """What the model card in a directory says, by the names of `Checkpoint.facts`; and notes."""
    path = directory / FILE
    if not path.is_file():
        return {}, []
    require_inside(directory, FILE)
    logging.getLogger("metadata").setLevel(logging.CRITICAL)  # the note below says it
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        fields = Metadata.load_model_card(on_disk(path).parent)
    except Exception:  # PyYAML and the decoder raise whatever is wrong
        return {}, [f"{FILE}: unreadable front matter; name, license and languages are left out"]
    facts: dict[str, Any] = {}
    for fact, names in _KEYS.items():
        value = next((fields[name] for name in names if fields.get(name)), None)
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            facts[fact] = texts if fact == "languages" else ",".join(texts)
    return facts, []


def card_of(facts: Mapping[str, Any]) -> bytes | None:
    """A README.md with these facts; None where neither a license nor languages are known."""
    if not {"license", "languages"} & facts.keys():
        return None
    # JSON is YAML, and leaves no doubt whether `no` is a language
    lines = [
        f"{names[0]}: {json.dumps(facts[fact], ensure_ascii=False)}"
        for fact, names in _KEYS.items()
        if fact in facts
    ]
    title = f"\n# {facts['name']}\n" if "name" in facts else ""
    return ("---\n" + "\n".join(lines) + "\n---\n" + title).encode(errors="replace")
