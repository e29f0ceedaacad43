"""Open token files as a source, with a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.data.formats.source import token_files
from train.data.tokens import Source
from train.options import TokenOptions


def opened(path: Path, tokenizer: Path, **options: Any) -> Source:
    source = token_files(path, 1.0, TokenOptions(**options), tokenizer)
    assert source is not None
    return source


def error_of(call: Callable[[], object]) -> str:
    """The message of a ValueError, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
