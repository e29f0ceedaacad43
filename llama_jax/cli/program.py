"""How every command-line program here begins and ends: exit codes, errors, signals, the terminal.

A program is `run_program(command)`. What it prints goes through `print`, or through `console()` where it
has tables, progress or colours: rich would take `[b]` and `:smile:` in a path for markup of ours.
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

MISTAKE = 2
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE  # what a shell reports of a program that the signal ends

_LONGEST = 2000  # characters of an error
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ut of memory")


def run_program(
    command: Callable[[], int | None],
    *,
    interrupted: str = "interrupted",
    extra: str | None = None,
) -> int:
    """Run `command` and return the exit code of the program.

    Args:
        command: does all the work, parsing of arguments included; returns an exit code, None for 0.
        interrupted: the line that answers Ctrl-C and SIGTERM.
        extra: of this package, which installs what `command` imports.

    Returns:
        What `command` does; 2 for an error, said in one line on stderr; 130 where it was interrupted;
        141 where nobody reads its output any more.

    Raises:
        SystemExit: `command` did, as argparse does after --help.
    """
    _mend_standard_streams()
    # matplotlib works where it cannot keep its fonts, but says so at length
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    ended: SystemExit | None = None
    code = MISTAKE
    with _signals(), _short_warnings():
        try:
            try:
                code = command() or 0
            except SystemExit as exit_:
                ended = exit_
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where it can still be answered
        except BrokenPipeError:
            code, ended = BROKEN_PIPE, None
        except KeyboardInterrupt:
            code = INTERRUPTED
            _say(interrupted)
        except ModuleNotFoundError as error:
            if extra is None or error.name is None:
                raise
            _say_error(f"{error.name} is not installed; in the checkout: pip install '.[{extra}]'")
        except (
            ValueError,
            OSError,
            MemoryError,
            OverflowError,
            RecursionError,
            Warning,
        ) as error:
            code, ended = MISTAKE, None
            broken = _broken_output(error)
            _say_error(one_line(error if broken is None else broken))
        except BaseException as error:
            if not (is_of_tokenizers(error) or _is_of_a_backend(error)):
                raise
            _say_error(one_line(error))
    for stream in (sys.stdout, sys.stderr):
        _settle(stream)
    if ended is not None:
        raise ended
    return code


def leave(code: int) -> NoReturn:
    """End the process with what `run_program` returned.

    After an interruption without Python's own shutdown: it takes XLA's threads apart while they still
    compute, and ends in a crash now and then.
    """
    if code == INTERRUPTED:
        os._exit(code)  # the streams are flushed
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """What an error says, on one line; control characters of paths and texts in it are escaped.

    A backend's error is called lack of memory only where it is that, and else is told as it is.
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
    if len(text) > _LONGEST:  # as where a value that fills the file is shown
        text = f"{text[: _LONGEST - 200]} ... {text[-200:]}"
    return printable(text or type(error).__name__)


def _is_of_a_backend(error: BaseException) -> bool:
    """Whether XLA raised it, which it cannot have done before JAX is imported."""
    errors = sys.modules.get("jax.errors")
    return errors is not None and isinstance(error, errors.JaxRuntimeError)


def json_line(value: Any) -> str:
    """`value` as JSON on one line, non-ASCII characters as they are where stdout can have them."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return line


def _first(text: str) -> str:
    return text.splitlines()[0] if text else ""


def _say(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # nobody may be there to hear it
        print(line, file=sys.stderr)


def _say_error(line: str) -> None:
    from rich.text import Text

    with suppress(OSError, ValueError, AttributeError):
        text = Text.assemble(("error:", "bold red"), f" {line}")
        console(stderr=True).print(text, soft_wrap=True)


def _broken_output(error: Exception) -> OSError | None:
    """The error of writing to stdout, where `error` may be that, under its name."""
    if not isinstance(error, OSError) or error.filename is not None or sys.stdout is None:
        return None
    try:
        sys.stdout.flush()  # what could not be written is still in its buffer
    except OSError as again:
        return OSError(again.errno, again.strerror, "standard output")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        # a print that flushes keeps nothing; of a file, `staging.writing` would have said the name
        return OSError(error.errno, error.strerror, "standard output")
    return None


def _settle(stream: TextIO | None) -> None:
    """Flush a stream; what cannot be written is dropped, or Python would complain of it at the end."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _mend_standard_streams() -> None:
    """Streams that were closed are empty; text that the encoding lacks is escaped, not an error."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # or the next file to be opened would be taken for it
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
    """A UserWarning is a line on stderr, whatever Python was told to do with warnings."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _say(f"warning: {printable(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
