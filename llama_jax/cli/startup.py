"""What a program does before it imports anything else, and until its first result."""

import gc
import signal


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process as it ends any program, without a traceback.

    For a `__main__` to call before its other imports, which can take seconds; `run_program` then handles
    the signal. An ignored signal stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


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
