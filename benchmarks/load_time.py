"""`from_pretrained` of a bfloat16 directory against `cat` of the same file: time, and peak memory."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from benchmarks.random_checkpoint import write_random
from llama_jax import formatting
from llama_jax.presets import PRESETS

CONFIG = replace(PRESETS["llama-3.2-1b"], tie_word_embeddings=False)
ROUNDS = 5
ALLOWANCE = 600e6  # interpreter, JAX and its runtime

_CHILD = """
import json, re, sys, time
from llama_jax import LlamaForCausalLM
begin = time.perf_counter()
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - begin
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def main() -> None:
    """Write random weights; load them in fresh processes, alternating with `cat`."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        specs = write_random(CONFIG, directory, max_shard_size=1 << 62)  # one file for `cat`
        total, largest = sum(s.nbytes for s in specs), max(s.nbytes for s in specs)
        file = directory / "model.safetensors"
        pairs = []
        for _ in range(ROUNDS + 1):
            begin = time.perf_counter()
            subprocess.run(("cat", str(file)), stdout=subprocess.DEVNULL, check=True)
            cat = time.perf_counter() - begin
            pairs.append((cat, measure_load(directory)))
        pairs = pairs[1:]  # the first round warms the page cache
    cat = statistics.median(cat for cat, _ in pairs)
    load = statistics.median(child["seconds"] for _, child in pairs)
    ratio = statistics.median(child["seconds"] / cat for cat, child in pairs)
    peak = max(child["peak"] for _, child in pairs)
    table = Table(title=f"loading {total / 1e9:.2f} GB of bfloat16, warm, median of {ROUNDS}")
    for column in ("", "seconds", "ratio", "peak RSS", "allowed"):
        table.add_column(column, justify="right")
    table.add_row("cat", f"{cat:.2f}", "1", "", "")
    allowed = total + 2 * largest + ALLOWANCE
    table.add_row(
        "from_pretrained",
        f"{load:.2f}",
        f"{ratio:.2f}",
        f"{peak / 1e9:.2f} GB",
        f"{allowed / 1e9:.2f} GB",
    )
    formatting.console().print(table)


def measure_load(directory: Path) -> dict[str, float]:
    """Seconds and peak RSS in bytes of `from_pretrained` in a fresh process."""
    child = subprocess.run(
        (sys.executable, "-c", _CHILD, str(directory)), capture_output=True, text=True, check=True
    )
    return json.loads(child.stdout.splitlines()[-1])
