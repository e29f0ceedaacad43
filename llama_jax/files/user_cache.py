"""Where data is cached that can be made again: $XDG_CACHE_HOME/llama_jax, or ~/.cache/llama_jax."""

import os
from pathlib import Path


def cache_directory(purpose: str) -> Path:
    """The directory, which need not exist.

    Args:
        purpose: what the cache is for, for the error message.

    Raises:
        ValueError: the user has no home directory.
    """
    # a variable that is empty or not an absolute path counts as unset
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache.is_absolute():
        return cache / "llama_jax"
    try:
        return Path.home() / ".cache" / "llama_jax"
    except RuntimeError:
        raise ValueError(
            f"{purpose}: this user has no home directory for the cache; set XDG_CACHE_HOME or pass --data"
        ) from None
