"""One line, not a stack trace, where JAX's runtime ends this process because another one has died.

The runtime writes to file descriptor 2 and aborts, which cannot be caught: its callback has an argument
that jaxlib cannot convert for Python. So a small child process reads the descriptor; it outlives this
process and has the last word. All else is passed on as it is.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import BinaryIO

_LOGGED = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ ")
_OF_THE_RUNTIME = re.compile(
    rb"[WEF]\d{4} \S+ +\d+ (coordination_service\w*\.cc|preemption_sync_manager\.cc|client\.h):\d+\] "
)
_FATAL = b"Terminating process because the JAX distributed service"
_UNHEALTHY = re.compile(rb"tasks are unhealthy[^\n]*:((?:\s*\d+,?\n)+)")


def summarize_messages(advice: str) -> None:
    """Replace the last messages of the runtime by one line that ends with `advice`.

    Python's own stderr stays what it is, a terminal for example.
    """
    terminal = os.dup(2)
    reading, writing = os.pipe()
    # -I: the child must not import anything from the working directory
    command = [sys.executable, "-I", __file__, advice]
    child = subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL)
    child.returncode = 0  # it ends after this process: nobody waits for it
    os.close(reading)
    sys.stderr.flush()
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = open(terminal, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115


def pass_on(lines: Iterable[bytes], out: BinaryIO, advice: str) -> None:
    """Write the lines to `out`, and one line for what the runtime says of a process that has died.

    What may be the beginning of that is held back until it is certain.
    """
    held: list[bytes] = []
    fatal = False
    for line in lines:
        of_runtime = bool(_OF_THE_RUNTIME.match(line))
        if of_runtime or (held and not _LOGGED.match(line)):
            held.append(line)
            fatal = fatal or _FATAL in line
        elif not fatal:
            out.write(b"".join(held) + line)
            held.clear()
        out.flush()
    out.write(_summary(b"".join(held), advice) if fatal else b"".join(held))
    out.flush()


def _summary(text: bytes, advice: str) -> bytes:
    listed = b" ".join(_UNHEALTHY.findall(text))
    # without a list, it is process 0, which keeps it
    numbers = sorted({int(number) for number in listed.replace(b",", b" ").split()}) or [0]
    names = ", ".join(map(str, numbers))
    who = f"process {names} of the run has" if len(numbers) == 1 else f"processes {names} have"
    return f"error: {who} died or cannot be reached; {advice}\n".encode()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the process whose messages these are
    pass_on(sys.stdin.buffer, sys.stderr.buffer, sys.argv[1])
