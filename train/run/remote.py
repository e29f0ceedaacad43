"""Runs in an object store: they work in a local folder, of which every checkpoint is uploaded.

Object stores have no locks and no appending, and Orbax's files there need a driver for each store. So the
run itself only sees a local folder, and a thread copies what is new in it. A checkpoint counts once all of
it is there (`llama_jax.files.upload`). `.running` names the process that has the run: of two, the one that
began later keeps it, and the other stops.
"""

import os
import signal
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_jax.files.remote import file_system, name_in, storage_errors
from llama_jax.files.upload import remove, uploading, write_bytes
from llama_jax.formatting import first_line
from train.checkpoints import FOLDER as CHECKPOINTS
from train.options import FILE, CheckpointOptions, DistributedOptions
from train.run.folder import EXPORTS
from train.run.processes import has_other_processes

_RUNNING = ".running"
_SECONDS = 1.0  # between looks at the local folder
_urls: dict[Path, Path] = {}


def name_of(folder: Path) -> Path:
    """What the user calls a run's folder: its URL, if it is the local copy of a remote one."""
    return _urls.get(folder, folder)


def require_one_process(url: Path, options: DistributedOptions) -> None:
    """Raise ValueError for a remote run of several processes."""
    if has_other_processes(options):
        raise ValueError(
            f"{url}: several processes need a folder that all of them see: mount the bucket (with gcsfuse, "
            "Mountpoint for S3 or the like) and give the path"
        )


@contextmanager
def local_run(url: Path, step: int | None = None) -> Iterator[Path]:
    """A local copy of a remote run with one checkpoint, the newest or that of `step`.

    Raises:
        ValueError: no run there, no complete checkpoint of that step, or it cannot be read.
    """
    names = _files(url)
    if FILE not in names:
        raise ValueError(f"{url}: not the folder of a run: it has no {FILE}")
    steps = _complete_steps(names)
    if step is not None and step not in steps:
        raise ValueError(
            f"step: found {step}, expected one of {', '.join(map(str, steps)) or 'none'}"
        )
    chosen = step if step is not None else max(steps, default=None)
    wanted = [
        name
        for name in names
        if not name.startswith((f"{CHECKPOINTS}/", f"{EXPORTS}/", "."))
        or name.startswith(f"{CHECKPOINTS}/{chosen}/")
    ]
    with _folder(url) as folder:
        for name in wanted:
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{url}: has an object named {name!r}, expected files of a run")
            path.parent.mkdir(parents=True, exist_ok=True)
            with storage_errors(url):
                file_system(url).get_file(name_in(url / name), str(path))
        yield folder


@contextmanager
def new_run(url: Path) -> Iterator[Path]:
    """A local folder in which a remote run begins. Raises ValueError unless `url` is empty."""
    if any(not name.startswith(".") for name in _files(url)):
        raise ValueError(
            f"{url}: is not empty; choose another --out, or resume the run with "
            f"`python -m train resume {url}`"
        )
    with _folder(url) as folder:
        yield folder


@contextmanager
def mirrored(folder: Path, url: Path, options: CheckpointOptions) -> Iterator[None]:
    """Within, what the run writes to `folder` is copied to `url`; at the end, all of it is.

    Raises:
        ValueError: `url` cannot be written, or another process has taken over the run.
    """
    claim = uuid.uuid4().hex.encode()
    write_bytes(url / _RUNNING, claim)
    mirror = _Mirror(folder, url, options, claim)
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(mirror, ended), daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        mirror.require_claim()  # it may be what ended the run
        with suppress(Exception):
            mirror.copy(last=True)
        raise
    else:
        ended.set()
        thread.join()
        mirror.copy(last=True)
    finally:
        with suppress(Exception):
            if mirror.is_claimed():
                file_system(url).rm_file(name_in(url / _RUNNING))


def _watch(mirror: "_Mirror", ended: threading.Event) -> None:
    problem = ""
    while not ended.wait(_SECONDS):
        try:
            mirror.copy()
        except FileNotFoundError:
            continue  # a file that has been replaced meanwhile
        except Exception as error:
            if not mirror.is_claimed():
                os.kill(os.getpid(), signal.SIGTERM)  # the run saves, and ends with this error
                return
            if (line := first_line(error)) != problem:
                problem = line
                warnings.warn(f"{problem}; trying again", stacklevel=1)


class _Mirror:
    """Copies what is new in a run's folder."""

    def __init__(self, folder: Path, url: Path, options: CheckpointOptions, claim: bytes) -> None:
        self._folder, self._url, self._options, self._claim = folder, url, options, claim
        self._copied: dict[str, tuple[int, int]] = {}
        self._directories = {f"{CHECKPOINTS}/{step}" for step in _complete_steps(_files(url))}
        self._exports: dict[str, object] = {}

    def is_claimed(self) -> bool:
        """Whether this process still has the run; also if that cannot be found out."""
        try:
            content: bytes = file_system(self._url).cat_file(name_in(self._url / _RUNNING))
        except FileNotFoundError:
            return False
        except Exception:
            return True
        return content == self._claim

    def require_claim(self) -> None:
        """Raise ValueError if another process has the run."""
        if not self.is_claimed():
            raise ValueError(f"{self._url}: another process has taken over this run")

    def copy(self, *, last: bool = False) -> None:
        """Copy files that have changed, then new checkpoints, then exports; remove old checkpoints.

        Args:
            last: nothing is being written any more.
        """
        if not (self._folder / FILE).is_file():
            return  # there is no run yet
        steps = [path for path in (self._folder / CHECKPOINTS).glob("*") if path.name.isdecimal()]
        new = sorted(
            (step for step in steps if f"{CHECKPOINTS}/{step.name}" not in self._directories),
            key=lambda path: int(path.name),
            reverse=True,  # the newest is what matters most
        )
        if new or last or not self._copied:  # the lines of metrics go with the checkpoints
            changed = self._changed()
            self.require_claim()
            for name, status in changed.items():
                write_bytes(self._url / name, (self._folder / name).read_bytes())
                self._copied[name] = status
        for step in new:
            self._copy_directory(step)
        if new:
            self._remove_old()
        for export in (self._folder / EXPORTS).glob("*"):
            name = f"{EXPORTS}/{export.name}"
            content = {file: file.stat().st_size for file in export.rglob("*") if file.is_file()}
            # one that has changed since the last look is still being written
            if name not in self._directories and (last or self._exports.get(name) == content):
                self.require_claim()
                remove(self._url / name)  # of the same step, before the run was interrupted
                self._copy_directory(export)
            self._exports[name] = content

    def _changed(self) -> dict[str, tuple[int, int]]:
        """Size and time of small files that are new or have changed, by name.

        run.toml is last: it makes a folder a run.
        """
        inner = (CHECKPOINTS, EXPORTS)
        files = [
            file
            for entry in self._folder.iterdir()
            if not entry.name.startswith(".") and entry.name not in inner
            for file in ([entry] if entry.is_file() else entry.rglob("*"))
            if file.is_file()
        ]
        changed = {}
        for file in sorted(files, key=lambda file: file.name == FILE):
            name, stat = file.relative_to(self._folder).as_posix(), file.stat()
            status = stat.st_size, stat.st_mtime_ns
            if self._copied.get(name) != status:
                changed[name] = status
        return changed

    def _copy_directory(self, directory: Path) -> None:
        name = directory.relative_to(self._folder).as_posix()
        try:
            with uploading(self._url / name) as upload:
                # what a checkpoint holds is compared with its fingerprints whenever it is read
                upload(directory, verify=False)
        except (ValueError, OSError):
            if directory.exists():
                raise
            return  # a newer checkpoint has replaced it meanwhile
        self._directories.add(name)

    def _remove_old(self) -> None:
        steps = _complete_steps(_files(self._url))
        every = self._options.keep_every
        for step in steps[: -self._options.keep_last]:
            if every is None or step % every:
                remove(self._url / CHECKPOINTS / str(step))


@contextmanager
def _folder(url: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="llama_jax.") as directory:
        folder = Path(directory) / url.name
        folder.mkdir()
        _urls[folder] = url
        yield folder


def _files(url: Path) -> list[str]:
    """The names of all objects in a remote folder, relative to it."""
    store, name = file_system(url), name_in(url).rstrip("/")
    with storage_errors(url):
        store.invalidate_cache()
        return [file.removeprefix(f"{name}/") for file in store.find(name)]


def _complete_steps(names: list[str]) -> list[int]:
    """The steps of checkpoints that have been uploaded completely."""
    parts = [name.split("/") for name in names if name.startswith(f"{CHECKPOINTS}/")]
    incomplete = {part[1] for part in parts if part[1].startswith(".")}
    steps = {part[1] for part in parts if part[1].isdecimal() and len(part) > 2}
    return sorted(int(step) for step in steps if f".{step}.partial" not in incomplete)
