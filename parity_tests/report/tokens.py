"""The token ids that the report runs on."""

from pathlib import Path

import numpy as np

from llama_jax.text.lines import read_text
from llama_jax.text.tokenizer import load_tokenizer
from parity_tests.report.programs.checkpoint import Checkpoint

LENGTH = 2000  # at most, of the bundled text
_TEXT = Path(__file__).resolve().parents[2] / "LICENSE"


def bundled_tokens(checkpoint: Checkpoint) -> np.ndarray:
    """The first tokens of a text in this repository, by the checkpoint's tokenizer, int64 [1, T].

    Raises:
        ValueError: the checkpoint has no readable tokenizer.
    """
    try:
        tokenizer = load_tokenizer(checkpoint.directory)
    except ValueError as error:
        raise ValueError(f"{error}; or give token ids with --tokens FILE") from None
    ids = tokenizer.encode(read_text(_TEXT)).ids[:LENGTH]
    return _checked(np.asarray(ids), checkpoint, str(_TEXT))


def read_tokens(path: Path, checkpoint: Checkpoint) -> np.ndarray:
    """Token ids from a file, int64 [1, T]: a .npy array, or integers separated by spaces or commas.

    Cut to the length of the model's context.

    Raises:
        ValueError: no such file, fewer than two ids, or ids outside the vocabulary.
    """
    try:
        if path.suffix.lower() == ".npy":
            ids = np.load(path, allow_pickle=False)
        else:
            words = read_text(path).replace(",", " ").split()
            ids = np.asarray([int(word) for word in words], np.int64)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: expected token ids, a .npy array or integers ({error})"
        ) from None
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{path}: found {ids.dtype}, expected integers")
    return _checked(ids.reshape(-1), checkpoint, str(path))


def _checked(ids: np.ndarray, checkpoint: Checkpoint, source: str) -> np.ndarray:
    config = checkpoint.config
    if len(ids) < 2:
        raise ValueError(f"{source}: found {len(ids)} tokens, expected at least 2")
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise ValueError(
            f"{source}: found token {outside[0]}, expected 0 to {config.vocab_size - 1}"
        )
    return ids[None, : config.max_position_embeddings].astype(np.int64)
