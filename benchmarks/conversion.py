"""Conversion between every pair of formats: time beside `cp` of the same bytes, and peak memory.

The model has random bfloat16 values in the shape of a preset and is in the temporary directory; every
conversion runs in a separate process and includes verification. All pairs of an 8B model would take 80 GB
of disk, so name some:

python -m benchmarks convert --preset llama-3.1-8b --pairs hf-orbax orbax-hf hf-gguf
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.random_checkpoint import write_random
from llama_jax import formatting
from llama_jax.cli.arguments import Parser
from llama_jax.presets import PRESETS

ROOT = Path(__file__).parents[1]
FORMATS = ("hf", "orbax", "gguf", "meta")
# a pair's source is Hugging Face's or the output of an earlier pair
PAIRS = [
    *("hf-orbax", "hf-gguf", "hf-meta", "orbax-hf", "orbax-gguf", "orbax-meta"),
    *("gguf-hf", "gguf-orbax", "gguf-meta", "meta-hf", "meta-orbax", "meta-gguf"),
    *("hf-hf", "orbax-orbax", "gguf-gguf", "meta-meta"),
]


def main(arguments: Sequence[str] = ()) -> None:
    parser = Parser(
        prog="python -m benchmarks convert", description="Convert between every pair of formats."
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="llama-3.2-1b", help="model to convert"
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=PAIRS,
        metavar="FROM-TO",
        help="conversions to time, such as hf-gguf, in this order; default: all",
    )
    options = parser.parse_args(arguments)
    require_sources(options.pairs)
    console = formatting.console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checkpoints = {"hf": root / "hf"}
        specs = write_random(PRESETS[options.preset], checkpoints["hf"])
        nbytes = sum(spec.nbytes for spec in specs)
        rows = []
        for pair in options.pairs:
            source, _, target = pair.partition("-")
            # right before the conversion, because the speed of disk and machine varies
            cp_seconds = time_cp(checkpoints["hf"], root / "copy")
            output = root / f"{pair}.gguf" if target == "gguf" else root / pair
            seconds, peak = convert(checkpoints[source], output, target)
            rows.append((pair, seconds, cp_seconds, peak))
            console.print(f"{pair}: {seconds:.1f} s, cp {cp_seconds:.1f} s, {peak / 1e6:.0f} MB")
            if target in checkpoints:
                remove(output)
            else:
                checkpoints[target] = output
    table = Table(
        title=f"{options.preset}, {nbytes / 1e9:.1f} GB of bfloat16, verification included",
        title_justify="left",
    )
    for column in ("from-to", "seconds", "/ cp", "peak MB"):
        table.add_column(column, justify="left" if column == "from-to" else "right")
    for pair, seconds, cp_seconds, peak in rows:
        table.add_row(pair, f"{seconds:.1f}", f"{seconds / cp_seconds:.2f}", f"{peak / 1e6:.0f}")
    console.print(table)


def require_sources(pairs: Sequence[str]) -> None:
    """Raise ValueError where a pair is none, or its source is not there when it is needed."""
    available = {"hf"}
    for pair in pairs:
        source, _, target = pair.partition("-")
        if source not in FORMATS or target not in FORMATS:
            raise ValueError(f"--pairs: found {pair!r}, expected FROM-TO of {', '.join(FORMATS)}")
        if source not in available:
            raise ValueError(f"--pairs: {pair} needs an earlier pair that writes {source}")
        available.add(target)


def time_cp(source: Path, target: Path) -> float:
    """Seconds that `cp` takes."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    remove(target)
    return seconds


_CHILD = """
import re, sys
from convert.__main__ import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def convert(source: Path, target: Path, to: str) -> tuple[float, int]:
    """Seconds, from the start of the program, and peak bytes of one conversion in a separate process."""
    command = [sys.executable, "-c", _CHILD, str(source), str(target), "--to", to]
    start = time.perf_counter()
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(process.stderr)
    return seconds, int(process.stdout) * 1024


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
