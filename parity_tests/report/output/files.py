"""Write results to files; each appears under its name only when it is complete."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.files.staging import replacing, write_text


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """JSON has no NaN or infinity: they are null."""
    _write(path, json.dumps(_finite(values), indent=1, allow_nan=False) + "\n")


def write_html(page: str, path: Path) -> None:
    """A page that needs no other file."""
    _write(path, page)


def _write(path: Path, text: str) -> None:
    with replacing(path) as staged:
        write_text(staged, text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
