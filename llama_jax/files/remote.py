"""Paths in an object store or any other file system of fsspec: `s3://`, `gs://`, `az://`, `memory://`, ...

Such a path is a `upath.UPath` of the package universal_pathlib. It has the methods of `pathlib.Path` but is
not an instance of it, and `os.fspath` raises TypeError, so nothing takes it for a local file. Bytes are
read through `reading.open_file`. Credentials, endpoints and retries are those of the scheme's package,
such as s3fs, with its environment variables.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from llama_jax.formatting import first_line

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.\-]+):(?P<slashes>/{1,3})(?P<rest>.*)", re.DOTALL)
# extras of this package that install what a scheme needs; fsspec names the package of any other
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def remote_path(path: str | os.PathLike[str]) -> Path | None:
    """`path` as a path of another file system; None if it is one of this machine.

    `pathlib.Path` turns "s3://bucket" into "s3:/bucket", which is accepted too.

    Raises:
        ValueError: a scheme that is not known, or whose package is not installed.

    >>> remote_path("models/llama") is None
    True
    >>> str(remote_path("memory://models/llama"))
    'memory://models/llama'
    """
    if is_remote(path):
        return path  # type: ignore[return-value]
    text = str(path)
    match = _URL.fullmatch(text)
    if match is None or match["scheme"] in ("file", "local"):
        return None
    if match["slashes"] == "/" and (Path(path).exists() or Path(f"{match['scheme']}:").exists()):
        return None
    url = f"{match['scheme']}://{match['rest'].rstrip('/')}"
    try:
        from fsspec import get_filesystem_class
        from upath import UPath
    except ImportError:
        extra = _EXTRAS.get(match["scheme"], "remote")
        raise ValueError(
            f"{url}: universal_pathlib is not installed: pip install 'llama-jax[{extra}]'"
        ) from None
    try:
        get_filesystem_class(match["scheme"])  # imports what it needs
    except ImportError as error:
        package = _EXTRAS.get(match["scheme"])
        advice = f"pip install 'llama-jax[{package}]'" if package else first_line(error)
        raise ValueError(
            f"{url}: a package for {match['scheme']}:// is missing: {advice}"
        ) from None
    except ValueError:
        raise ValueError(
            f"{url}: fsspec knows no {match['scheme']}://, expected s3://, gs:// or the like"
        ) from None
    with storage_errors(url), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of schemes for which upath has no class of its own
        return cast(Path, UPath(url))


def is_remote(path: Any) -> bool:
    """Whether this is a path that `remote_path` returned."""
    return hasattr(path, "fs") and not isinstance(path, Path)


def file_system(path: Path) -> Any:
    """The fsspec file system of a remote path."""
    return path.fs  # type: ignore[attr-defined]


def name_in(path: Path) -> str:
    """What the file system of a remote path calls it."""
    name: str = path.path  # type: ignore[attr-defined]
    return name


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Within, whatever a file system raises becomes an error of one line that names `path`.

    Raises:
        ValueError: nothing there; no permission, or no credentials; a service that cannot be reached.
        OSError: a local disk is full or broken.
    """
    scheme = str(path).partition(":")[0]
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: not found: no file, folder or bucket of that name") from None
    except PermissionError as error:
        raise ValueError(
            f"{path}: no permission ({first_line(error)}); check the credentials for {scheme}://"
        ) from None
    except ValueError:
        raise
    except OSError as error:
        if error.filename is not None and not is_remote(error.filename):
            raise  # of a file on this machine
        raise ValueError(f"{path}: cannot be reached ({first_line(error)})") from None
    except NotImplementedError:
        raise ValueError(f"{path}: {scheme}:// cannot do this; use another place") from None
    except Exception as error:  # every client library has errors of its own
        raise ValueError(f"{path}: cannot be reached ({first_line(error)})") from None
