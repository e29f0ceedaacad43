"""Where a command keeps the programs that XLA compiled, so that the next command need not compile them.

JAX's persistent compilation cache, in a folder for each kind of machine: XLA compiles for the processor
that it runs on, and JAX's keys do not tell two processors apart, which may read the same home directory.
"""

import argparse
import hashlib
import os
import platform
import warnings
from contextlib import suppress
from pathlib import Path

from llama_jax.cli.arguments import Parser
from llama_jax.files.paths import local_path
from llama_jax.files.remote import remote_path
from llama_jax.files.user_cache import cache_directory

LARGEST = 2 * 2**30
"""Bytes of a folder; what was not used for longest goes first."""

_SHORTEST = 0.02  # seconds of a compilation that is worth a file; a resumed run has many small ones


def add_cache(parser: Parser) -> None:
    """`--cache` and `--no-cache`, as all commands have them that compile."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--cache",
        type=local_path,
        metavar="DIR",
        help="where compiled programs are kept for the next time; default: LLAMA_JAX_CACHE, or "
        f"llama_jax/compiled in the user's cache directory; at most {LARGEST // 2**30} GiB",
    )
    group.add_argument("--no-cache", action="store_true", help="keep no compiled programs")


def keep_compiled_programs(options: argparse.Namespace) -> None:
    """Let JAX read and write compiled programs where the options of `add_cache` say.

    Nothing is done where JAX's own variable JAX_COMPILATION_CACHE_DIR is set, or LLAMA_JAX_CACHE is empty.
    To be called before anything is compiled.

    Raises:
        ValueError: a remote directory.
        OSError: `--cache` cannot be a directory.
    """
    if options.no_cache:
        _use(None)
    elif options.cache is not None:
        _use(_made(_local("--cache", options.cache)))
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := _default()) is not None:
        # nobody asked for it: without a home directory, or where it cannot be written, all is compiled
        with suppress(OSError):
            _use(_made(folder))


def program_folder() -> Path | None:
    """Where `keep_compiled_programs` keeps those of this machine; None if it does not.

    A directory of JAX's own variable does not count: other machines or users may have it too.
    """
    import jax

    folder = jax.config.values["jax_compilation_cache_dir"]
    return Path(folder) if folder is not None and Path(folder).name == _machine() else None


def _default() -> Path | None:
    chosen = os.environ.get("LLAMA_JAX_CACHE")
    if chosen is not None:
        return _local("LLAMA_JAX_CACHE", Path(chosen)) if chosen else None
    with suppress(ValueError):  # no home directory
        return cache_directory("compiled programs") / "compiled"
    return None


def _local(name: str, folder: Path) -> Path:
    if remote_path(folder) is not None:
        raise ValueError(f"{name}: {folder} is remote, expected a directory of this machine")
    return folder


def _made(folder: Path) -> Path:
    """The directory in `folder` for this machine."""
    own = folder / _machine()
    # whoever can write there can run code as this user
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    return own


def _use(folder: Path | None) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
    # a file that cannot be read or written, when the disk is full for example: the program is compiled
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def _machine() -> str:
    """A name for the processor and the compiler."""
    import jaxlib

    facts = [jaxlib.__version__, platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    # of the first core; the rest of the file changes with the clock
    for name in ("model name", "flags", "Features"):
        facts += [line for line in lines if line.startswith(name)][:1]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
