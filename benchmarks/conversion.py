"""Conversion between every pair of formats: time beside `cp` of as many bytes, and peak memory.

The model has random values in the shape of a preset and is in the temporary directory; every conversion
runs in a separate process and includes verification. Sources of other programs (fp8, maxtext, dcp) are made
as those programs write them. `cp` copies the source right before, both read it from the disk, and its time
is scaled to the bytes that the conversion reads and writes. All pairs of an 8B model would take 80 GB of
disk, so name some:

python -m benchmarks convert --preset llama-3.1-8b --pairs fp8-hf maxtext-hf dcp-hf --json FILE
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from benchmarks.foreign_checkpoints import FOREIGN
from benchmarks.random_checkpoint import write_random
from llama_jax import formatting
from llama_jax.cli.arguments import Parser
from llama_jax.files.staging import replacing, write_text
from llama_jax.presets import PRESETS

ROOT = Path(__file__).parents[1]
FORMATS = ("hf", "orbax", "gguf", "meta")
# a pair's source is Hugging Face's, another program's or the output of an earlier pair
PAIRS = [
    *("hf-orbax", "hf-gguf", "hf-meta", "orbax-hf", "orbax-gguf", "orbax-meta"),
    *("gguf-hf", "gguf-orbax", "gguf-meta", "meta-hf", "meta-orbax", "meta-gguf"),
    *("hf-hf", "orbax-orbax", "gguf-gguf", "meta-meta"),
]


@dataclass(frozen=True)
class Timing:
    """One conversion, and `cp` of its source; sizes in bytes, times in seconds."""

    pair: str
    seconds: float
    processor_seconds: float
    peak: int
    read: int
    written: int
    cp_seconds: float
    cp_processor_seconds: float
    load: float
    """Of the machine, over the minute before the end."""

    @property
    def ratio(self) -> float:
        """Time relative to `cp`'s, for each byte that is read or written."""
        return self.seconds / self.cp_seconds / self._work

    @property
    def processor_ratio(self) -> float:
        """The same of the processor's time."""
        return self.processor_seconds / self.cp_processor_seconds / self._work

    @property
    def _work(self) -> float:
        return (self.read + self.written) / (2 * self.read)


def main(arguments: Sequence[str] = ()) -> None:
    parser = Parser(
        prog="python -m benchmarks convert", description="Convert between pairs of formats."
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="llama-3.2-1b", help="model to convert"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the preset has")
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=PAIRS,
        metavar="FROM-TO",
        help="conversions to time, such as hf-gguf, in this order; default: all between "
        f"{', '.join(FORMATS)}; FROM may also be {', '.join(FOREIGN)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args(arguments)
    require_sources(options.pairs)
    config = PRESETS[options.preset]
    if options.layers is not None:
        if not 0 < options.layers <= config.num_hidden_layers:
            raise ValueError(
                f"--layers: found {options.layers}, expected 1 to {config.num_hidden_layers}"
            )
        config = replace(config, num_hidden_layers=options.layers)
    console = formatting.console(width=100)
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checkpoints: dict[str, Path] = {}
        for number, pair in enumerate(options.pairs):
            source, _, target = pair.partition("-")
            if source not in checkpoints:
                checkpoints[source] = root / source
                if source == "hf":
                    write_random(config, root / source)
                else:
                    FOREIGN[source](config, root / source)
            output = root / f"{pair}.gguf" if target == "gguf" else root / pair
            timings.append(measure(pair, checkpoints[source], output, target))
            last = timings[-1]
            console.print(
                f"{pair}: {last.seconds:.1f} s, cp {last.cp_seconds:.1f} s, {last.peak / 1e6:.0f} MB"
            )
            needed = {later.partition("-")[0] for later in options.pairs[number + 1 :]}
            if source in FOREIGN and source not in needed:
                remove(checkpoints[source])
            if target in checkpoints or target not in needed:
                remove(output)
            else:
                checkpoints[target] = output
    console.print(table(options.preset, timings))
    if options.json is not None:
        result = {
            "preset": options.preset,
            "layers": config.num_hidden_layers,
            "processor": processor(),
            "cores": os.cpu_count(),
            "pairs": [
                {**asdict(t), "ratio": t.ratio, "processor_ratio": t.processor_ratio}
                for t in timings
            ],
        }
        with replacing(options.json) as staged:
            write_text(staged, json.dumps(result, indent=2) + "\n")


def table(preset: str, timings: Sequence[Timing]) -> Table:
    """A row for each conversion."""
    shown = Table(
        title=f"{preset}, verification included, on {os.cpu_count()} cores of {processor()}",
        title_justify="left",
    )
    columns = (
        "from-to",
        "GB read",
        "GB written",
        "seconds",
        "/ cp",
        "CPU s",
        "/ cp",
        "peak MB",
        "load",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column == "from-to" else "right")
    for each in timings:
        shown.add_row(
            each.pair,
            f"{each.read / 1e9:.1f}",
            f"{each.written / 1e9:.1f}",
            f"{each.seconds:.1f}",
            f"{each.ratio:.2f}",
            f"{each.processor_seconds:.1f}",
            f"{each.processor_ratio:.2f}",
            f"{each.peak / 1e6:.0f}",
            f"{each.load:.1f}",
        )
    return shown


def require_sources(pairs: Sequence[str]) -> None:
    """Raise ValueError where a pair is none, or its source is not there when it is needed."""
    available = {"hf", *FOREIGN}
    for pair in pairs:
        source, _, target = pair.partition("-")
        if source not in (*FORMATS, *FOREIGN) or target not in FORMATS:
            raise ValueError(
                f"--pairs: found {pair!r}, expected FROM-TO, from one of "
                f"{', '.join((*FORMATS, *FOREIGN))} to one of {', '.join(FORMATS)}"
            )
        if source not in available:
            raise ValueError(f"--pairs: {pair} needs an earlier pair that writes {source}")
        available.add(target)


def measure(pair: str, source: Path, output: Path, to: str) -> Timing:
    """Time `cp` and then the conversion, both of a source that is not in the page cache."""
    copy = output.with_name("copy")
    forget(source)
    cp_seconds, cp_processor, _ = timed(["cp", "-r", str(source), str(copy)])
    remove(copy)
    forget(source)
    command = [sys.executable, "-c", _CHILD, str(source), str(output), "--to", to]
    if to != "gguf":
        command += ["--dtype", "bfloat16"]
    seconds, processor_seconds, stdout = timed(command)
    return Timing(
        pair=pair,
        seconds=seconds,
        processor_seconds=processor_seconds,
        peak=int(stdout) * 1024,
        read=size(source),
        written=size(output),
        cp_seconds=cp_seconds,
        cp_processor_seconds=cp_processor,
        load=os.getloadavg()[0],
    )


_CHILD = """
import re, sys
from convert.__main__ import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def timed(command: Sequence[str]) -> tuple[float, float, str]:
    """Seconds and processor seconds of a program from its start, and what it printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(process.stderr)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used, process.stdout


def forget(path: Path) -> None:
    """Write a file, or those of a directory, to the disk and remove them from the page cache."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def size(path: Path) -> int:
    """Bytes of a file, or of all in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
