"""Checkpoints by their names on the Hugging Face Hub, through huggingface_hub and its cache.

Its environment variables hold: HF_HOME and HF_HUB_CACHE (where the cache is), HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llama_jax.files.foreign_weights import describe
from llama_jax.formatting import first_line

_PART = r"[A-Za-z0-9][\w.\-]*"
_NAME = re.compile(
    rf"(?P<scheme>hf:/{{1,2}})?(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[^@\s]+?))?"
    r"(?:/(?P<file>[^\s@]+\.gguf))?"
)
# the weights of a repository that has several kinds of them: those of the first kind are taken
_WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
    r"adapter_model\.(safetensors|bin)",
    r"consolidated\.\d+\.pth",
    r"[^/]*\.safetensors",
    r"flax_model[^/]*\.msgpack(\.index\.json)?",
)
# all that is not weights: configuration, tokenizer, templates
_SMALL = r"[^/]*\.(json|jinja|txt|model)|additional_chat_templates/[^/]*"
_INDEX = r".*\.index\.json"


class HubName(NamedTuple):
    """A repository on the Hub, or one file in it.

    revision: a branch, a tag or a commit; None is the main branch.
    """

    repository: str
    revision: str | None
    file: str | None


def hub_name(path: str | Path) -> HubName | None:
    """The repository that `path` names; None if it is, or looks like, a path on this machine.

    A name is "owner/name", "owner/name@revision" or, of a GGUF file, "owner/name/file.gguf"; with "hf://"
    before it, it is a name even if there is a directory that is called so.

    >>> hub_name("meta-llama/Llama-3.2-1B@main")
    HubName(repository='meta-llama/Llama-3.2-1B', revision='main', file=None)
    >>> hub_name("./meta-llama/Llama-3.2-1B")
    """
    match = _NAME.fullmatch(str(path))
    if match is None:
        return None
    if match["scheme"] is None:
        local = Path(path)
        if local.exists() or local.is_symlink() or Path(local.parts[0]).exists():
            return None
    return HubName(match["repository"], match["revision"], match["file"])


def cached_path(path: str | Path, *, weights: bool = True) -> Path:
    """`path` itself, or for a name on the Hub the directory in the cache that its files are now in.

    Files that are not in the cache yet are downloaded. Where the Hub cannot be reached, what the cache has
    is used.

    Args:
        weights: download them, in the first of these forms that the repository has: safetensors, PyTorch's,
            an adapter, Meta's, Flax's. If not: only configuration, tokenizer and templates.

    Raises:
        ValueError: a name that is not on the Hub, or that needs permission; no network and nothing in the
            cache; several GGUF files and none named; huggingface_hub is not installed.
        OSError: the cache cannot be written.
    """
    name = hub_name(path)
    if name is None:
        return Path(path)
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{path}: {describe(Path(path))}; if it is a name on the Hub, huggingface_hub is needed: "
            "pip install 'llama-jax[hub]'"
        ) from None
    with _one_line_errors(path, name):
        return _download(path, name, weights)


def _download(path: str | Path, name: HubName, weights: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(name.repository, revision=name.revision)
    except Exception as error:
        known = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if known or not isinstance(error, (OSError, OfflineModeIsEnabled, *_network_errors())):
            raise
        if (cached := _cached(name)) is None:
            raise
        return cached
    files = [each.rfilename for each in info.siblings or ()]
    if name.file is not None:
        if name.file not in files:
            raise ValueError(f"{path}: {name.repository} has no such file")
        return Path(hf_hub_download(name.repository, name.file, revision=name.revision))
    wanted = [file for file in files if re.fullmatch(_SMALL, file)]
    wanted = [file for file in wanted if not re.fullmatch(_INDEX, file)]
    if weights:
        wanted += _weights_among(path, name, files)
    if not wanted:
        raise ValueError(f"{path}: {name.repository} has no checkpoint")
    # square brackets, stars and question marks would be patterns
    patterns = [re.sub(r"([*?\[])", r"[\1]", file) for file in dict.fromkeys(wanted)]
    return Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=patterns))


def _weights_among(path: str | Path, name: HubName, files: list[str]) -> list[str]:
    for pattern in _WEIGHTS:
        if found := [file for file in files if re.fullmatch(pattern, file)]:
            return found
    gguf = [file for file in files if file.endswith(".gguf")]
    if gguf:
        shown = ", ".join(sorted(gguf)[:20])
        raise ValueError(
            f"{path}: has GGUF files only; convert one of them, as {name.repository}/FILE: {shown}"
        )
    return files


def _cached(name: HubName) -> Path | None:
    """Where the cache has the repository, or the file; None if it does not."""
    from huggingface_hub import try_to_load_from_cache

    markers = (name.file,) if name.file else ("config.json", "params.json", "adapter_config.json")
    for marker in markers:
        found = try_to_load_from_cache(name.repository, marker, revision=name.revision)
        if isinstance(found, str):
            return Path(found) if name.file else Path(found).parent
    return None


def _network_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library of huggingface_hub raises where there is no connection."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(
        base
        for base in HfHubHTTPError.__mro__
        if base.__name__ in ("HTTPError", "RequestException")
    )


@contextmanager
def _one_line_errors(path: str | Path, name: HubName) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{name.repository}"
    try:
        yield
    except OfflineModeIsEnabled:
        problem = "no such directory, and not in the Hub's cache, while HF_HUB_OFFLINE forbids to download"
    except GatedRepoError:
        problem = (
            f"gated: ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN"
        )
    except DisabledRepoError:
        problem = f"disabled by the Hub, see {page}"
    except RepositoryNotFoundError:
        problem = (
            "neither a directory nor a repository on the Hub; for a private one log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    except RevisionNotFoundError:
        problem = f"{name.repository} has no revision {name.revision!r}"
    except HFValidationError as error:
        problem = f"no name on the Hub ({first_line(error)})"
    except LocalEntryNotFoundError as error:
        problem = f"cannot be downloaded, and not in the cache ({first_line(error)})"
    except HfHubHTTPError as error:
        problem = f"the Hub refuses ({first_line(error)})"
    except _network_errors() as error:
        problem = (
            f"no such directory, and the Hub cannot be reached ({first_line(error)}); "
            "for what the cache has, set HF_HUB_OFFLINE=1"
        )
    except OSError as error:
        if error.errno is None or error.errno == errno.ECONNREFUSED:
            problem = f"cannot be downloaded ({first_line(error)})"
        else:
            folder = constants.HF_HUB_CACHE
            raise OSError(error.errno, f"{error.strerror}, in the Hub's cache", folder) from None
    else:
        return
    raise ValueError(f"{path}: {problem}")


def push(path: Path, repository: str, *, message: str) -> str:
    """Upload a directory's files, or one file, to a repository on the Hub, and return its address.

    Args:
        repository: "owner/name"; created, as a private one, if it does not exist.
        message: of the commit.

    Raises:
        ValueError: no name of a repository; no token, or one without permission to write; no network;
            huggingface_hub is not installed.
    """
    name = require_pushable(repository)
    from huggingface_hub import HfApi, constants

    with _one_line_errors(repository, name):
        api = HfApi()
        api.create_repo(name.repository, private=True, exist_ok=True)
        if path.is_dir():
            api.upload_folder(folder_path=path, repo_id=name.repository, commit_message=message)
        else:
            api.upload_file(
                path_or_fileobj=path,
                path_in_repo=path.name,
                repo_id=name.repository,
                commit_message=message,
            )
        return f"{constants.ENDPOINT}/{name.repository}"


def require_pushable(repository: str) -> HubName:
    """Raise ValueError unless this names a repository and there is a token to push to it with."""
    match = _NAME.fullmatch(repository)
    if match is None or match["revision"] or match["file"]:
        raise ValueError(f"push: found {repository!r}, expected owner/name")
    try:
        from huggingface_hub import get_token
    except ImportError:
        raise ValueError(
            "push: huggingface_hub is not installed: pip install 'llama-jax[hub]'"
        ) from None
    if get_token() is None:
        raise ValueError("push: no token; log in with `hf auth login` or set HF_TOKEN")
    return HubName(match["repository"], None, None)
