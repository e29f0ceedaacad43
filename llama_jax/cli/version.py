"""The answer to `--version`."""

import platform
from importlib import metadata
from pathlib import Path

_NAME = "llama-jax"


def version_line() -> str:
    """The versions of the library, of JAX and of Python: "llama_jax 0.2.0 (jax 0.10.2, Python 3.11.7)"."""
    return f"llama_jax {_own_version()} (jax {_version('jax')}, Python {platform.python_version()})"


def _own_version() -> str:
    import tomllib

    # a checkout is newer than the metadata of its last installation
    try:
        file = Path(__file__).parents[2] / "pyproject.toml"
        project = tomllib.loads(file.read_text("utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return _version(_NAME)
    return str(project["version"]) if project["name"] == _NAME else _version(_NAME)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
