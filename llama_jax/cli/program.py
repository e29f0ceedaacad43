"""The frame of every command-line program: exit codes, one-line errors, signals, broken terminals.

A program is `run_program(command)`. It prints with `print`, or with `console()` for tables, progress bars
and colors: rich's own console would take `[b]` and `:smile:` in a path for markup.
"""

import errno
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

from llama_jax.formatting import console, printable
from llama_jax.text.tokenizers_errors import is_of_tokenizers

ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE  # as a shell reports a program that the signal ended

_LONGEST = 2000  # characters of an error
# errors of the user, the machine or the input; any other is a bug of ours, and shown with its traceback
_REPORTED = (ValueError, OSError, MemoryError, OverflowError, RecursionError, Warning)
_STORAGE = ("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "requests")
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ut of memory")


def run_program(
    command: Callable[[], int | None],
    *,
    interrupted: str = "interrupted",
    extra: str | None = None,
) -> int:
    """Run `command` and return the exit code of the program.

    Args:
        command: does all the work, including parsing; returns an exit code, or None for 0.
        interrupted: the line to print after Ctrl-C or SIGTERM.
        extra: the extra of this package that installs what `command` imports.

    Returns:
        What `command` returns; 2 after an error, which is printed as one line on stderr; 130 after an
        interrupt; 141 if nobody reads the output any more.

    Raises:
        SystemExit: as `command` raises it, for example after --help.
    """
    _repair_standard_streams()
    # matplotlib works without a writable directory for its font cache, but warns at length
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    system_exit: SystemExit | None = None
    code = ERROR
    with _short_warnings():
        try:
            # around the command alone: a second interrupt ends the program while this one is reported
            with _signals():
                try:
                    code = command() or 0
                except SystemExit as request:
                    system_exit = request
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, where an error can still be reported
        except BrokenPipeError:
            code, system_exit = BROKEN_PIPE, None
        except KeyboardInterrupt:
            code, system_exit = INTERRUPTED, None
            _print_line(interrupted)
        except ModuleNotFoundError as error:
            if extra is None or error.name is None:
                raise
            _print_error(
                f"{error.name} is not installed; in the checkout: pip install '.[{extra}]'"
            )
        except _REPORTED as error:
            code, system_exit = ERROR, None
            _print_error(one_line(_stdout_error(error) or error))
        except BaseException as error:
            if not (is_of_tokenizers(error) or _is_of_a_backend(error) or _is_of_storage(error)):
                raise
            _print_error(one_line(error))
    for stream in (sys.stdout, sys.stderr):
        _flush_or_drop(stream)
    if system_exit is not None:
        raise system_exit
    return code


def leave(code: int, *, at_once: bool = False) -> NoReturn:
    """End the process with the exit code of `run_program`.

    After an interrupt this skips Python's own shutdown, which sometimes crashes: it tears down XLA's
    threads while they are still computing. One of several processes skips it after an error as well, or if
    nobody reads its output: JAX would wait there for the others, which wait for this one.

    Args:
        at_once: skip it in any case, for a program with nothing left to do. To take JAX apart, a model and
            its programs can take more than a second.
    """
    if at_once or code == INTERRUPTED or (code in (ERROR, BROKEN_PIPE) and _is_one_of_several()):
        os._exit(code)  # the streams are flushed
    sys.exit(code)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def one_line(error: BaseException) -> str:
    """The message of an error on one line, with control characters escaped.

    >>> print(one_line(ValueError("two\\nlines")))
    two\\nlines
    """
    text = str(error).strip()
    backend = _is_of_a_backend(error)
    if isinstance(error, MemoryError) or (backend and any(word in text for word in _OUT_OF_MEMORY)):
        text = f"not enough memory: {_first(text)}" if text else "not enough memory"
    elif backend:
        text = f"the backend failed: {_first(text)}"
    elif isinstance(error, OverflowError):
        text = f"a size is out of range: {_first(text)}"
    elif isinstance(error, RecursionError):
        text = f"nested too deeply: {_first(text)}"
    elif isinstance(error, Warning):
        text = f"{type(error).__name__}: {text}"
    elif isinstance(error, OSError) and error.strerror is not None:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([*(os.fsdecode(n) if isinstance(n, bytes) else str(n) for n in names),
                          error.strerror])  # fmt: skip
    if len(text) > _LONGEST:  # it may quote a value that fills the file
        text = f"{text[: _LONGEST - 200]} ... {text[-200:]}"
    return printable(text or type(error).__name__)


def _is_of_a_backend(error: BaseException) -> bool:
    """Whether XLA raised it, which it cannot have done before JAX is imported."""
    errors = sys.modules.get("jax.errors")
    return errors is not None and isinstance(error, errors.JaxRuntimeError)


def _is_of_storage(error: BaseException) -> bool:
    """Whether it is an error of a client library for remote files: an object store, or its network."""
    return type(error).__module__.partition(".")[0] in _STORAGE


def json_line(value: Any) -> str:
    """`value` as JSON on one line; non-ASCII characters are escaped only if stdout cannot encode them."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return line


def _first(text: str) -> str:
    return text.splitlines()[0] if text else ""


def _print_line(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # stderr may be closed
        print(line, file=sys.stderr)


def _print_error(line: str) -> None:
    from rich.text import Text

    with suppress(OSError, ValueError, AttributeError):
        text = Text.assemble(("error:", "bold red"), f" {line}")
        console(stderr=True).print(text, soft_wrap=True)


def _stdout_error(error: Exception) -> OSError | None:
    """`error` with the name of the stream, if it is the failure to write to stdout."""
    if not isinstance(error, OSError) or error.filename is not None or sys.stdout is None:
        return None
    try:
        sys.stdout.flush()  # fails again, as the buffer still has what could not be written
    except OSError as again:
        return OSError(again.errno, again.strerror, "standard output")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        # a print that flushes leaves nothing in the buffer; errors of files have a name
        return OSError(error.errno, error.strerror, "standard output")
    return None


def _flush_or_drop(stream: TextIO | None) -> None:
    """Flush a stream, and drop what cannot be written: Python would complain about it at exit."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _repair_standard_streams() -> None:
    """Replace closed streams by empty ones, and escape characters that the encoding lacks."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the next file to be opened would get this number
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise KeyboardInterrupt, so that unfinished files are removed.

    Ignored signals stay ignored. A signal that arrives during an import is answered after it: jaxlib and
    other extension modules crash when an exception stops their initialization.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not _importing(frame):
            raise KeyboardInterrupt
        _send_again(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    changed = [number for number, handler in before.items() if handler in defaults]
    hook = sys.unraisablehook

    def unraisable(args: Any) -> None:
        if isinstance(args.exc_value, KeyboardInterrupt):
            _send_again(
                signal.SIGINT
            )  # raised in a destructor or a callback of the garbage collector
        else:
            hook(args)

    sys.unraisablehook = unraisable
    try:
        for number in changed:
            signal.signal(number, interrupt)
        yield
    finally:
        sys.unraisablehook = hook
        for number in changed:
            signal.signal(number, before[number])


def _importing(frame: FrameType | None) -> bool:
    """Whether the code that `run_program` runs is importing a module."""
    while frame is not None and frame.f_code is not run_program.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    again = threading.Timer(0.02, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print every UserWarning as one line on stderr, whatever PYTHONWARNINGS says."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _print_line(f"warning: {printable(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
