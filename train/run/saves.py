"""The saves of a run, and what becomes of them where the disk is full."""

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax

from llama_jax.cli.program import one_line
from llama_jax.files.staging import DISK_FULL
from train import checkpoints
from train.checkpoints import DiskFullError, IncompatibleError, Restored
from train.options import CheckpointOptions, RunOptions
from train.options_toml import to_toml
from train.program.build import Program
from train.run.folder import last_saved_step
from train.run.remote import name_of


def emergency_folder(folder: Path, directory: Path | None) -> Path | None:
    """Where this run's checkpoints are in --checkpoint.emergency-dir, which other runs may share."""
    if directory is None:
        return None
    path = str(name_of(folder).absolute())
    return directory / f"{folder.name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


class Saves:
    """Saves of a run.

    Where the disk is full, the oldest checkpoints are removed, but not the newest, nor those of
    --checkpoint.keep-every, and the state is saved again. If that is not enough, the state is saved in
    --checkpoint.emergency-dir, and the run ends.

    elsewhere: whether the run goes on from a checkpoint in --checkpoint.emergency-dir.
    """

    def __init__(self, folder: Path, options: RunOptions, program: Program) -> None:
        self._folder, self._options, self._program = folder, options, program
        self._emergency = emergency_folder(folder, options.checkpoint.emergency_dir)
        self._manager = _open(folder, options.checkpoint)
        self._failed: DiskFullError | None = None
        self.elsewhere = False

    def close(self) -> None:
        """Wait for what is being saved, and end."""
        self._manager.close()

    def last_step(self) -> int:
        """That of the newest checkpoint on either disk, which may be damaged; 0 without one."""
        elsewhere = 0 if self._emergency is None else last_saved_step(self._emergency)
        return max(self._manager.latest_step() or 0, elsewhere)

    def restore(self) -> Restored | None:
        """The newest intact checkpoint on either disk; None without one.

        Raises as `checkpoints.restore`.
        """
        if self._emergency is not None and self.last_step() > (self._manager.latest_step() or 0):
            with closing(_open(self._emergency, self._options.checkpoint)) as saved:
                try:
                    self.elsewhere = True
                    return self._restored(saved)
                except IncompatibleError:
                    raise
                except ValueError as error:
                    self.elsewhere = False
                    warnings.warn(f"{error}; falling back to {self._folder}", stacklevel=2)
        return self._restored(self._manager)

    def _restored(self, manager: Any) -> Restored | None:
        return checkpoints.restore(
            manager,
            self._program.params,
            self._program.opt_state,
            model=self._program.config.to_dict(),
        )

    def save(self, step: int, params: Any, opt_state: Any) -> None:
        """Start saving. Raises as `checkpoints.save`, after which nothing of the run is lost."""
        self._trying(
            step,
            params,
            opt_state,
            lambda: checkpoints.save(self._manager, step, params, opt_state, self._facts(step)),
        )

    def check(self, step: int, params: Any, opt_state: Any) -> None:
        """Notice that the last save has failed, and make up for it with the state after `step`."""
        self._trying(
            step, params, opt_state, lambda: checkpoints.require_no_failed_save(self._manager)
        )

    def wait(self, step: int, params: Any, opt_state: Any) -> None:
        """Wait until all is saved; as `check`."""
        self._trying(step, params, opt_state, lambda: checkpoints.wait(self._manager))

    @contextmanager
    def rescuing(self, state: Callable[[], tuple[int, Any, Any]]) -> Iterator[None]:
        """Within, a file that cannot be written because the disk is full ends the run, but not unsaved.

        Args:
            state: returns the steps done, the parameters and the optimizer state.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL or jax.process_count() > 1:
                raise
            step, params, opt_state = state()
            with suppress(ValueError):
                checkpoints.wait(self._manager)
            if self._manager.latest_step() == step:
                self._end(step, self._folder)
            if not self._saved_again(step, params, opt_state):
                self._save_elsewhere(error, step, params, opt_state)
            self._end(step, self._folder)

    def retrying(self, write: Callable[..., None]) -> Callable[..., None]:
        """`write`, tried again without what a failed save has left, if the disk is full."""

        def written(*args: Any, **more: Any) -> None:
            try:
                write(*args, **more)
            except OSError as error:
                if error.errno not in DISK_FULL or jax.process_count() > 1:
                    raise
                try:
                    checkpoints.wait(self._manager)
                except DiskFullError as failed:
                    self._failed = failed
                    checkpoints.remove_unfinished(self._folder)
                write(*args, **more)

        return written

    def _trying(self, step: int, params: Any, opt_state: Any, save: Callable[[], None]) -> None:
        try:
            if self._failed is not None:
                failed, self._failed = self._failed, None
                raise failed
            save()
        except DiskFullError as error:
            if jax.process_count() > 1:
                raise  # the others may have had space
            if not self._saved_again(step, params, opt_state):
                self._save_elsewhere(error, step, params, opt_state)

    def _save_elsewhere(self, error: Exception, step: int, params: Any, opt_state: Any) -> NoReturn:
        if self._emergency is None:
            raise ValueError(
                f"{one_line(error)}: free space and resume, or name a directory on another disk with "
                "--checkpoint.emergency-dir"
            ) from None
        self._emergency.mkdir(parents=True, exist_ok=True)
        with closing(_open(self._emergency, CheckpointOptions(keep_last=1))) as elsewhere:
            self._save_now(elsewhere, step, params, opt_state)
        self._end(step, self._emergency)

    def _end(self, step: int, where: Path) -> NoReturn:
        raise ValueError(
            f"{self._folder}: the disk is full; step {step} was saved in {where}: free space, then "
            f"`python -m train resume {name_of(self._folder)}`"
        ) from None

    def _saved_again(self, step: int, params: Any, opt_state: Any) -> bool:
        """Whether the state could be saved in the run's folder after all, without its old checkpoints."""
        self._open_again()
        *older, newest = sorted(self._manager.all_steps()) or [0]
        every = self._options.checkpoint.keep_every
        older = [step for step in older if every is None or step % every]
        sizes = {step: _size(self._folder / checkpoints.FOLDER / str(step)) for step in older}
        needed = _size(self._folder / checkpoints.FOLDER / str(newest))
        if shutil.disk_usage(self._folder).free + sum(sizes.values()) < needed:
            return False
        for old in older:
            self._manager.delete(old)
        try:
            self._save_now(self._manager, step, params, opt_state)
        except DiskFullError:
            self._open_again()
            return False
        if older:
            warnings.warn(
                f"{self._folder}: the disk is full; removed the checkpoints of steps "
                f"{', '.join(map(str, older))} to save step {step}",
                stacklevel=2,
            )
        return True

    def _open_again(self) -> None:
        with suppress(Exception):  # the error is known
            self._manager.close()
        checkpoints.remove_unfinished(self._folder)
        self._manager = _open(self._folder, self._options.checkpoint)

    def _save_now(self, manager: Any, step: int, params: Any, opt_state: Any) -> None:
        checkpoints.save(manager, step, params, opt_state, self._facts(step))
        checkpoints.wait(manager)

    def _facts(self, step: int) -> dict[str, Any]:
        return {
            "seed": self._options.seed,
            "next_window": step * self._options.batch_size,
            "options": to_toml(self._options),
            "model": self._program.config.to_dict(),
        }


def _open(folder: Path, options: CheckpointOptions) -> Any:
    return checkpoints.open_manager(
        folder, keep_last=options.keep_last, keep_every=options.keep_every
    )


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
