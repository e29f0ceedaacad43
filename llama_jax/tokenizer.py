"""Text to token ids and back, by the checkpoint's own `tokenizer.json`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(directory: str | Path) -> "Tokenizer":
    """The tokenizer of a Hugging Face directory, or of the file itself, as `tokenizers` reads it.

    Raises:
        ValueError: no tokenizer.json, one that the library refuses, or the library not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(
            "tokenizers is not installed, expected the extra: pip install 'llama-jax[generate]'"
        ) from None
    path = Path(directory)
    path = path if path.is_file() else path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found, expected the checkpoint's tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise ValueError(f"{path}: not a tokenizer ({error})") from None
