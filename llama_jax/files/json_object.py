"""JSON files that hold one object."""

import json
from pathlib import Path
from typing import Any

from llama_jax.files.foreign_weights import POINTER, is_pointer


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a file that must hold one JSON object. Raises ValueError naming the file and the fault."""
    content = b""
    try:
        content = path.read_bytes()
        value = json.loads(content)
    except FileNotFoundError:
        raise ValueError(f"{path}: not found, expected a JSON file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        fault = POINTER if is_pointer(content) else f"not valid JSON ({error})"
        raise ValueError(f"{path}: {fault}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value
