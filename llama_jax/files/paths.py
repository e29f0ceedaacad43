"""What a user's path is: a local path, one of another file system, or a name on the Hugging Face Hub."""

import os
from pathlib import Path

from llama_jax.files import hub
from llama_jax.files.remote import file_system, is_remote, name_in, remote_path, storage_errors


def source_path(path: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The path to read: `path` itself or, for a name on the Hub, its files in the local cache.

    Args:
        path: a local path, `owner/name` on the Hub, or a URL of fsspec, such as "s3://bucket/model".
        weights: whether a download from the Hub includes them.

    Raises:
        ValueError: as `hub.cached_path`; nothing at the URL, no way to reach it, or an upload to it that
            was interrupted.

    >>> source_path("./models/llama")
    PosixPath('models/llama')
    """
    if is_remote(path):
        return path  # type: ignore[return-value]
    text = os.fspath(path)
    if hub.hub_name(text) is not None:
        return hub.cached_path(text, weights=weights)
    if (remote := remote_path(text)) is None:
        return local_path(text)
    with storage_errors(remote):
        file_system(remote).invalidate_cache()
        file_system(remote).info(name_in(remote))
        incomplete = marker_of(remote).exists()
    if incomplete:
        raise ValueError(
            f"{remote}: incomplete, for its upload was interrupted or is under way; repeat what writes it"
        )
    return remote


def destination_path(path: str | os.PathLike[str]) -> Path:
    """The path to write: an absolute local path, or a URL of fsspec.

    Raises:
        ValueError: a URL that cannot be written, or of a whole bucket.
    """
    remote = remote_path(path)
    if remote is None:
        return Path(os.path.abspath(local_path(path)))
    if str(remote).startswith("hf:"):
        raise ValueError(f"{remote}: write to a local directory, and add --push owner/name")
    if not remote.name:
        raise ValueError(f"{remote}: is a bucket; give a name within it")
    return remote


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path of this machine; "file://" and "local://" are removed."""
    text = os.fspath(path)
    for prefix in ("file:///", "local:///", "file:/", "local:/"):
        if text.startswith(prefix) and not Path(text).exists():
            return Path("/" + text.removeprefix(prefix))
    return Path(path)


def marker_of(path: Path) -> Path:
    """What is there while a remote path is written: `.NAME.partial` beside it."""
    return path.with_name(f".{path.name}.partial")
