"""Measure in a process of its own: two programs in one process would share the memory of a GPU."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_jax.numerics.xla_options import leave_loops_rolled, reserve_gpu_memory

ROOT = Path(__file__).parents[1]
_FIRST = "result: "


class FailedError(Exception):
    """The process ended without a result; the message is its last line."""

    @property
    def out_of_memory(self) -> bool:
        return "out of memory" in str(self).lower() or "RESOURCE_EXHAUSTED" in str(self)


def measure(function: str, *arguments: Any, seconds: float = 400) -> Any:
    """What `MODULE:FUNCTION` of this package returns; arguments and result must be JSON.

    Raises:
        FailedError: it raised, or took longer than `seconds`.
    """
    command = [sys.executable, "-m", "benchmarks.isolated", function, json.dumps(arguments)]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise FailedError(f"took longer than {seconds:.0f} s") from None
    lines = process.stdout.splitlines()
    if process.returncode == 0 and lines and lines[-1].startswith(_FIRST):
        return json.loads(lines[-1].removeprefix(_FIRST))
    raise FailedError(_cause(process.stderr))


def _cause(stderr: str) -> str:
    """The last line that names an exception, or the last of all."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    named = [line for line in lines if "Error" in line.split(":")[0] and ":" in line]
    return (named or lines)[-1][:300]


def _main() -> None:
    module, _, name = sys.argv[1].partition(":")
    reserve_gpu_memory()  # as a run does; programs of torch never start JAX
    leave_loops_rolled()
    function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    print(_FIRST + json.dumps(function(*json.loads(sys.argv[2]))))


if __name__ == "__main__":
    _main()
