"""The training step beside MaxText's, compiled for the same slices of TPUs: memory and traffic.

Nothing runs: the numbers are XLA's own, and both programs' collectives are read in the same way. MaxText
needs Python 3.12 or newer, so it is compiled by an interpreter of its own (`pip install 'maxtext[tpu]'`);
without one, only our programs are. To compile ours with the same versions of JAX and libtpu as MaxText's,
run this with that interpreter. A case takes minutes.

python -m benchmarks pod --maxtext-python venv-maxtext/bin/python --cases 8b 70b --json pod.json
"""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from llama_jax import formatting
from llama_jax.cli.arguments import Parser
from llama_jax.files.staging import replacing, write_text
from train.hardware.chips import CHIPS, GIB
from train.hardware.collectives import collectives
from train.hardware.tpu_topology import ENVIRONMENT, KINDS, parse_tpu_topology
from train.hardware.transfers import KINDS as COLLECTIVES

ROOT = Path(__file__).resolve().parent.parent


class Case(NamedTuple):
    """A model on a slice. variants: settings of MaxText to compile besides its defaults, by name."""

    preset: str
    topology: str
    rows: int
    sequence_length: int
    mesh: Mapping[str, int]
    remat: str = "full"
    variants: Mapping[str, Mapping[str, object]] = {}


CASES = {
    "8b": Case(
        "llama-3.1-8b",
        "v5p:4x4x4",
        512,
        8192,
        {"fsdp": 64},
        variants={"vocabulary in 8 tiles": {"num_vocab_tiling": 8}},
    ),
    "8b-dots": Case("llama-3.1-8b", "v5p:4x4x4", 128, 8192, {"fsdp": 64}, remat="dots"),
    "70b": Case("llama-3.1-70b", "v5p:8x8x8", 512, 8192, {"fsdp": 128, "tensor": 4}),
    "8b-32k": Case("llama-3.1-8b", "v5p:4x4x4", 64, 32768, {"fsdp": 16, "sequence": 4}),
    "405b": Case("llama-3.1-405b", "v5p:8x16x16", 1024, 8192, {"fsdp": 256, "sequence": 8}),
}
MAXTEXT_AXES = {"fsdp": "fsdp", "sequence": "context", "tensor": "tensor"}
MAXTEXT_REMAT = {"full": "full", "dots": "minimal_with_context"}

# a row of the table, as it is kept in the JSON file
Row = dict[str, Any]


def main(arguments: Sequence[str] = ()) -> None:
    """Print each case as it is compiled, and all of them as a table."""
    parser = Parser(prog="python -m benchmarks pod", description="Compile our step and MaxText's.")
    parser.add_argument(
        "--maxtext-python",
        type=Path,
        metavar="PATH",
        help="Python interpreter with maxtext installed; default: only our programs are compiled",
    )
    parser.add_argument(
        "--cases",
        nargs="*",
        choices=CASES,
        default=list(CASES),
        metavar="NAME",
        help=f"cases to compile: {', '.join(CASES)}; default: all",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all numbers; rows that FILE has of other cases are kept and shown",
    )
    options = parser.parse_args(arguments)
    python: Path | None = options.maxtext_python
    if python is not None and not os.access(python, os.X_OK):
        raise ValueError(f"maxtext-python: {python} is not an executable file")
    console = formatting.console(width=140)
    rows = read_rows(options.json)
    for name in options.cases:
        variants = [] if python is None else ["", *CASES[name].variants]
        for variant in (None, *variants):
            row = ours(name) if variant is None else maxtext(name, variant, python)
            console.print(f"{name}, {row['program']}: {row['peak'] / GIB:.1f} GiB")
            rows = with_row(rows, row)
            if options.json is not None:
                with replacing(options.json) as staged:
                    write_text(staged, json.dumps(rows, indent=2) + "\n")
    console.print(table(rows))


def ours(name: str) -> Row:
    """Our step, as `python -m train plan` compiles it."""
    case = CASES[name]
    flags = {
        "--topology": case.topology,
        "--model.preset": case.preset,
        "--model.remat": case.remat,
        "--batch-size": case.rows,
        "--sequence-length": case.sequence_length,
        **{f"--mesh.{axis}": size for axis, size in case.mesh.items()},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        words = [str(word) for flag in (*flags.items(), ("--json", file)) for word in flag]
        _run([sys.executable, "-m", "train", "plan", *words], ROOT)
        plan = json.loads(file.read_text())
    if plan["refused"] is not None:
        raise ValueError(f"{name}: XLA refuses to compile our step ({plan['refused']})")
    return {
        "case": name,
        "program": "llama_jax",
        "versions": {package: importlib.metadata.version(package) for package in ("jax", "libtpu")},
        "peak": plan["peak"],
        "compile_seconds": plan["compile_seconds"],
        **_traffic(name, {each["kind"]: each for each in plan["collectives"]}),
    }


def maxtext(name: str, variant: str, python: Path | None) -> Row:
    """MaxText's step, as its `train_compile` compiles it, with the settings of a variant ("" for none)."""
    settings = maxtext_settings(CASES[name], variant)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step"
        words = [f"{key}={value}" for key, value in settings.items()]
        script = Path(__file__).with_name("maxtext_step.py")
        command = [str(python), str(script), str(out), *words, f"base_output_directory={folder}"]
        _run(command, Path(folder))
        result = json.loads(out.with_suffix(".json").read_text())
        found = collectives(out.with_suffix(".hlo").read_text())
    program = f"MaxText, {variant}" if variant else "MaxText"
    kinds = {kind: vars(collective) for kind, collective in found.items()}
    return {"case": name, "program": program, **result, **_traffic(name, kinds)}


def maxtext_settings(case: Case, variant: str) -> dict[str, object]:
    """MaxText's names of what a case asks for."""
    slices = parse_tpu_topology(case.topology)
    chips = slices.number * math.prod(slices.shape)
    return {
        "compile_topology": f"{slices.generation}-{2 * chips}",  # v4 and v5p are named by cores
        "compile_topology_num_slices": slices.number,
        "model_name": case.preset.replace("llama-", "llama"),
        "per_device_batch_size": case.rows / chips,
        "max_target_length": case.sequence_length,
        **{f"ici_{MAXTEXT_AXES[axis]}_parallelism": size for axis, size in case.mesh.items()},
        "allow_split_physical_axes": True,
        "remat_policy": MAXTEXT_REMAT[case.remat],
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "run_name": "pod",
        **(case.variants[variant] if variant else {}),
    }


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a program that compiles; nothing of it is shown.

    Raises:
        ValueError: it failed; the message ends with the last line that it wrote.
    """
    env = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
    env.pop("TPU_LIBRARY_PATH", None)  # importing jax set it, to this interpreter's libtpu
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise ValueError(f"{command[0]} {command[1]}: exit code {done.returncode}: {last}")


def _traffic(name: str, kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes sent by kind, and seconds on all of a chip's links in parallel, of all and of the exposed."""
    generation = parse_tpu_topology(CASES[name].topology).generation
    chip = next(CHIPS[kind] for kind, known in KINDS.items() if known == generation)
    seconds = {
        key: sum(each[amount] for each in kinds.values()) / chip.link_bandwidth
        for key, amount in (("link_seconds", "sent"), ("exposed_seconds", "exposed"))
    }
    return {"sent": {kind: each["sent"] for kind, each in kinds.items()}, **seconds}


def read_rows(file: Path | None) -> list[Row]:
    """The rows of an earlier call; none where there is no file.

    Raises:
        ValueError: a file that is not of this benchmark.
    """
    if file is None or not file.exists():
        return []
    try:
        rows = json.loads(file.read_text())
        assert all({"case", "program", "versions", "peak", "sent"} <= row.keys() for row in rows)
    except (ValueError, AssertionError, AttributeError, TypeError):
        raise ValueError(f"json: {file} is not a file of this benchmark") from None
    return list(rows)


def with_row(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows, in the order of cases, with one added or, if it is of the same versions, replaced."""
    same = "case", "program", "versions"
    others = [old for old in rows if any(old[key] != row[key] for key in same)]
    return sorted([*others, row], key=lambda each: list(CASES).index(each["case"]))


def table(rows: Sequence[Row]) -> Table:
    """Peak memory, gigabytes sent and seconds, of one chip and step."""
    kinds = [kind for kind in COLLECTIVES if any(kind in row["sent"] for row in rows)]
    shown = Table(title="one chip and step", title_justify="left")
    for column in ("case", "program", "jax\nlibtpu"):
        shown.add_column(column)
    sends = (f"{kind.removeprefix('collective-')}\nGB" for kind in kinds)
    for column in ("peak\nGiB", *sends, "links\ns", "exposed\ns", "compiled\nin"):
        shown.add_column(column, justify="right")
    for row in rows:
        sent = [f"{row['sent'].get(kind, 0.0) / 1e9:.1f}" for kind in kinds]
        shown.add_row(
            row["case"],
            row["program"],
            f"{row['versions']['jax']}\n{row['versions']['libtpu']}",
            f"{row['peak'] / GIB:.1f}",
            *sent,
            f"{row['link_seconds']:.2f}",
            f"{row['exposed_seconds']:.2f}",
            f"{row['compile_seconds']:.0f} s",
        )
    return shown
