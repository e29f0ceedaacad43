"""What there is to do on an NVIDIA GPU: the tests that need one, and the benchmarks; the results are kept.

`python -m benchmarks gpu`, or `make gpu`. Needs JAX with CUDA, pytest, and for the comparisons torch with
CUDA and transformers; nothing is fetched. Every part runs in processes of its own, and the results are
written after each table, so that an interrupted run keeps what it has measured.
"""

import datetime
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import decode, loss, step
from benchmarks.isolated import ROOT
from benchmarks.report import Report, markdown, show
from llama_jax import formatting
from llama_jax.cli.arguments import Parser
from parity_tests.harness.nvidia import device_kind

PARTS = ("step", "loss", "decode", "tests")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")
RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] = ()) -> None:
    parser = Parser(
        prog="python -m benchmarks gpu",
        description="On an NVIDIA GPU: run the tests that need one and the benchmarks, and write the "
        "results to benchmarks/results/. Elsewhere: say so.",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        metavar="PART",
        help=f"what to run, in this order; default: {' '.join(PARTS)}",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="directory of DATE-DEVICE.json and .md",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="small shapes, also without a GPU: tries this program, measures nothing of interest",
    )
    options = parser.parse_args(arguments)
    kind = device_kind()
    console = formatting.console(soft_wrap=True)
    if kind is None and not options.tiny:
        console.print("no NVIDIA GPU here: nothing was run")
        return
    name = re.sub(r"\W+", "-", kind or "cpu").strip("-").lower()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{datetime.date.today()}-{name}"
    reports: list[Report] = []
    failures = 0
    for report in _reports(options.parts, kind or "cpu", tiny=options.tiny):
        show(report)
        reports.append(report)
        failures += report.title.startswith("tests") and report.values[0]["exit_code"] != 0
        write(file, kind or "cpu", reports)
    console.print(f"written: {file}.md, {file}.json")
    if failures:
        raise ValueError("gpu: tests failed, see above")


def _reports(parts: Sequence[str], kind: str, *, tiny: bool) -> Iterator[Report]:
    tables: dict[str, Callable[[], Iterator[Report]]] = {
        "step": lambda: step.gpu_reports(kind, step.TINY if tiny else step.GPU),
        "loss": lambda: iter([loss.gpu_report(kind, loss.TINY if tiny else loss.GPU)]),
        "decode": lambda: decode.gpu_reports(kind, decode.TINY if tiny else decode.GPU),
        "tests": lambda: iter([run_tests()]),
    }
    for part in parts:
        yield from tables[part]()


def run_tests() -> Report:
    """The tests with the marker `gpu`; warnings of other versions than ours are no errors here."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings=default", "parity_tests/test_gpu.py"]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = process.stdout.splitlines()
    if process.returncode:
        print(process.stdout)
    return Report(
        "tests that need a GPU",
        ("", "result"),
        [["parity_tests/test_gpu.py", lines[-1] if lines else "no output"]],
        [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))],
        [{"exit_code": process.returncode}],
    )


def write(file: Path, kind: str, reports: Sequence[Report]) -> None:
    """FILE.json and FILE.md."""
    versions = {"python": sys.version.split()[0]} | {
        name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)
    }
    facts: dict[str, Any] = {"date": str(datetime.date.today()), "device": kind}
    facts |= {"versions": versions, "reports": [report._asdict() for report in reports]}
    file.with_name(f"{file.name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = f"# {kind}, {facts['date']}\n\n{listed}; `python -m benchmarks gpu`\n\n"
    text = head + "\n".join(map(markdown, reports))
    file.with_name(f"{file.name}.md").write_text(text)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
