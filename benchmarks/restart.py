"""Time until the first step of a run: of a new one that compiles, and of the same run resumed.

Both in turn, each in a process of its own, with the default model and data; a signal stops them after that
step. A new cache of compiled programs for each pair, the same for both of it. Python's bytecode is there,
as after the first run of a user: of a pair that is not counted.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.isolated import ROOT
from benchmarks.report import Report, show
from benchmarks.user_environment import user_environment
from train.monitoring.history import read_events
from train.run.stop import RESUME

PAIRS = 3
_RUN = ("--steps=1000", "--evaluation.every=0")
_SAID = "first step after"


class Start(NamedTuple):
    """Seconds from the start of the process to the end of its first step; of all its threads; by part."""

    seconds: float
    processor: float
    parts: dict[str, float]


def start(
    arguments: Sequence[str], run: Path, cache: Path, environment: Mapping[str, str]
) -> Start:
    """Run a command of `python -m train`, and stop it after its first step."""
    variables = {**environment, "LLAMA_JAX_CACHE": str(cache), "COLUMNS": "400"}
    begin, seconds, lines = time.perf_counter(), None, []
    command = [sys.executable, "-m", "train", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line.startswith(_SAID):
                seconds = time.perf_counter() - begin
                process.terminate()
    if process.returncode != RESUME or seconds is None:
        raise ValueError(f"{' '.join(arguments)}: ended with {process.returncode}: {lines[-1:]}")
    *_, parts = (event["seconds"] for event in read_events(run) if event["event"] == "first step")
    return Start(seconds, parts.pop("processor"), parts)


def measure(environment: Mapping[str, str]) -> tuple[Start, Start]:
    """A new run, and the same one resumed."""
    with tempfile.TemporaryDirectory() as folder:
        run, cache = Path(folder) / "run", Path(folder) / "cache"
        first = start(["run", "--out", str(run), *_RUN], run, cache, environment)
        return first, start(["resume", str(run)], run, cache, environment)


def tabulate(pairs: Sequence[tuple[Start, Start]]) -> Report:
    """Medians, and the median of the ratios."""

    def row(name: str, of: Any) -> list[str]:
        first, again = ([of(pair[which]) for pair in pairs] for which in (0, 1))
        ratio = statistics.median(b / a for a, b in zip(first, again, strict=True) if a)
        return [
            name,
            f"{statistics.median(first):.2f}",
            f"{statistics.median(again):.2f}",
            f"{ratio:.2f}",
        ]

    names = [name for name in pairs[0][1].parts if name != "total"]
    return Report(
        f"seconds until the first step, medians of {len(pairs)}",
        ("", "new run", "resumed", "ratio"),
        [
            row("all, from the start of the process", lambda one: one.seconds),
            row("processor", lambda one: one.processor),
            *(row(name, lambda one, name=name: one.parts[name]) for name in names),
        ],
        [],
        [{"new": first._asdict(), "resumed": again._asdict()} for first, again in pairs],
    )


def main() -> None:
    """Measure and print the table."""
    with user_environment() as environment:
        measure(environment)  # for the bytecode
        show(tabulate([measure(environment) for _ in range(PAIRS)]))


if __name__ == "__main__":
    main()
