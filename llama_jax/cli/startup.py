"""What a program does before it imports anything else."""

import signal


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process as it ends any program, without a traceback.

    For a `__main__` to call before its other imports, which can take seconds; `run_program` then handles
    the signal. An ignored signal stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
