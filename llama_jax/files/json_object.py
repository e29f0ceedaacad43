"""JSON files with one object."""

import json
from pathlib import Path
from typing import Any

from llama_jax.files.foreign_weights import POINTER, is_pointer


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        ValueError: the file cannot be read, is not JSON, or holds something else.

    >>> path = Path("config.json")
    >>> _ = path.write_text('{"hidden_size": 64}')
    >>> read_json_object(path)
    {'hidden_size': 64}
    """
    content = b""
    try:
        content = path.read_bytes()
        value = json.loads(content)
    except FileNotFoundError:
        raise ValueError(f"{path}: not found") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        problem = POINTER if is_pointer(content) else f"not valid JSON ({error})"
        raise ValueError(f"{path}: {problem}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value
