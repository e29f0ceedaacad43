"""What a program does before it imports anything else, and until its first result."""

import ctypes
import gc
import os
import signal

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process as it ends any program, without a traceback.

    For a `__main__` to call before its other imports, which can take seconds; `run_program` then handles
    the signal. An ignored signal stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next allocations, where malloc is glibc's; for a run.

    XLA on a CPU allocates what a training step needs, and frees it, in each step. glibc maps pieces of
    this size anew, and the system fills them with zeros page by page, a tenth of a step's processor time
    (docs/log.md). For a `__main__` to call before there are threads, which would have heaps of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_ARENA_MAX, 1)


def without_garbage_collection() -> None:
    """Until `with_garbage_collection`: imports and tracing make many objects, and hardly any garbage.

    Looking for it takes an eighth of the processor time of a start.
    """
    gc.disable()


def with_garbage_collection() -> None:
    """From here on, but for the objects that there are: they stay, and are not looked through any more."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def restore_garbage_collection() -> None:
    """As Python begins, for a program that was called as a function."""
    gc.unfreeze()
    gc.enable()
