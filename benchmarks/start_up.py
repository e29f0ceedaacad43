"""From the shell to the text: imports, and `generate` as a whole command against transformers.

Every measurement is a process of its own; those that are compared alternate. Processor time (user and
system) depends less on what else runs than the wall's. Each command runs once before it is measured, so
that Python's bytecode is there.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.isolated import ROOT
from benchmarks.real_checkpoint import real_checkpoint
from benchmarks.report import Report, show
from benchmarks.user_environment import user_environment

IMPORTS = ("import jax", "import llama_jax", "from llama_jax import LlamaForCausalLM")
IMPORT_ROUNDS, ROUNDS, NEW = 10, 3, 32
PROMPT = "The history of the city begins with"
LONGER = "The history of the old city on the river begins with"

# what a user of transformers would write, with a streamer so that the first token is seen
_TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
directory, prompt, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
class Shown(TextStreamer):
    def put(self, value):
        if value.ndim == 1:  # not the prompt
            print(tokenizer.decode(value), end="", flush=True)
    def end(self):
        print()
with torch.no_grad():
    inputs = tokenizer(prompt, return_tensors="pt")
    model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=Shown(tokenizer)
    )
"""


class Times(NamedTuple):
    """Seconds of a process: until it first prints, until it ends, and of processors."""

    first: float
    total: float
    processor: float


def main() -> None:
    """Print the tables."""
    with user_environment() as environment:
        show(imports_report(environment))
        with real_checkpoint() as directory:
            show(generate_report(directory, environment))


def imports_report(environment: Mapping[str, str]) -> Report:
    """What the imports cost."""
    commands = {statement: [sys.executable, "-c", statement] for statement in IMPORTS}
    for command in commands.values():
        timed(command, environment)
    seconds: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
    for _ in range(IMPORT_ROUNDS):
        for statement, command in commands.items():
            seconds[statement].append(timed(command, environment).processor)
    medians = {statement: statistics.median(values) for statement, values in seconds.items()}
    base = medians[IMPORTS[0]]
    rows = [[text, f"{value:.2f} s", f"{value / base:.2f}"] for text, value in medians.items()]
    title = f"imports, processor time, median of {IMPORT_ROUNDS}"
    return Report(title, ("", "seconds", "ratio"), rows, [], [medians])


def generate_report(directory: Path, environment: Mapping[str, str]) -> Report:
    """`generate` with a new cache of compiled programs, with that of the run before, and transformers."""
    theirs = [sys.executable, "-c", _TRANSFORMERS, str(directory), PROMPT, str(NEW)]
    names = ("transformers", "ours, first", "ours, second", "ours, another prompt")
    runs: dict[str, list[Times]] = {name: [] for name in names}
    timed(theirs, environment)
    with tempfile.TemporaryDirectory() as cache:
        timed(ours(directory, PROMPT, Path(cache)), environment)
        compiled = compiled_by(ours(directory, LONGER, Path(cache)), environment)
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as cache:
            for name in names:
                prompt = LONGER if name == names[-1] else PROMPT
                command = ours(directory, prompt, Path(cache)) if name != names[0] else theirs
                runs[name].append(timed(command, environment))
    medians = {
        name: Times(*map(statistics.median, zip(*times, strict=True)))
        for name, times in runs.items()
    }
    base = medians[names[0]]
    rows = [
        [name] + [f"{value:.2f} s, {value / of:.2f}" for value, of in zip(times, base, strict=True)]
        for name, times in medians.items()
    ]
    return Report(
        f"generate, {NEW} tokens, float32, whole command, median of {ROUNDS}",
        ("", "first token", "all", "processor time"),
        rows,
        [f"compiled for another prompt after the first run: {', '.join(compiled) or 'nothing'}"],
        [{name: times._asdict() for name, times in medians.items()} | {"compiled": compiled}],
    )


def ours(directory: Path, prompt: str, cache: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "llama_jax", "generate", "--model", str(directory)),
        *("--prompt", prompt, "--max-new-tokens", str(NEW), "--dtype", "float32"),
        *("--temperature", "0", "--cache", str(cache)),
    ]


def timed(command: list[str], environment: Mapping[str, str] | None = None) -> Times:
    """Run a command.

    Raises:
        ValueError: it failed.
    """
    begin = time.perf_counter()
    first = None
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT, env=environment, bufsize=0
        )
        assert process.stdout is not None
        while process.stdout.read(4096):
            first = first or time.perf_counter() - begin
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        total = time.perf_counter() - begin
        errors.seek(0)
        if process.returncode:
            raise ValueError(f"{command[1:3]} failed: {errors.read().decode()[-300:]}")
    return Times(first or total, total, usage.ru_utime + usage.ru_stime)


def compiled_by(command: list[str], environment: Mapping[str, str]) -> list[str]:
    """The programs that XLA compiles for a command, without those that it finds compiled."""
    log = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**environment, "JAX_EXPLAIN_CACHE_MISSES": "1"},
    ).stderr
    missed = "PERSISTENT COMPILATION CACHE MISS for '"
    parts = log.split(missed)[1:]
    return [part.split("'")[0] for part in parts]
