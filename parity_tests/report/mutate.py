"""Run the report under every mutation: each must fail, and the module that it breaks must be named."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from parity_tests.harness.cases import BY_NAME, weights_of, write_hf_directory
from parity_tests.harness.mutations import MUTATIONS, mutate
from parity_tests.report.measure.metrics import first_to_drift
from parity_tests.report.programs.jax_layers import JaxProgram
from parity_tests.report.programs.program import MakeProgram
from parity_tests.report.run import Report, report

# Small, with everything that a mutation touches: grouped heads, scaled rope of another theta, eps 1e-5.
CASE = BY_NAME["rope_llama31"]
LENGTH = 96  # past the scaling's original context


class Caught(NamedTuple):
    """metrics: those beyond the tolerance. module: the first one to drift."""

    metrics: tuple[str, ...]
    module: str | None


def write_case(directory: Path) -> tuple[Path, Path]:
    """The case's checkpoint and a file of token ids for it."""
    checkpoint, tokens = directory / "checkpoint", directory / "tokens.npy"
    write_hf_directory(checkpoint, CASE.config, weights_of(CASE.config))
    np.save(tokens, np.random.default_rng(0).integers(0, CASE.config["vocab_size"], LENGTH))
    return checkpoint, tokens


def quiet_report(checkpoint: Path, tokens: Path, program: MakeProgram = JaxProgram) -> Report:
    """In float32 with gradients; prints nothing."""
    return report(checkpoint, tokens=tokens, with_backward=True, program=program)


def caught_by(report: Report) -> Caught:
    """What of the report is beyond the tolerance."""
    metrics = dict.fromkeys(check.metric for check in report.checks if not check.holds)
    return Caught(tuple(metrics), first_to_drift(report.modules))


def mutate_all(console: Console) -> bool:
    """Print a line for no mutation and for each one; return whether the report was right about all."""
    transformers.logging.disable_progress_bar()
    table = Table(box=SIMPLE_HEAD)
    table.add_column("mutation", no_wrap=True)
    table.add_column("caught by")
    table.add_column("first module to drift", no_wrap=True)
    table.add_column("")
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        files = write_case(Path(folder))
        status.update("no mutation")
        unbroken = caught_by(quiet_report(*files))
        all_right = unbroken == Caught((), None)
        table.add_row("none", *_cells(unbroken), "right" if all_right else "WRONG")
        for name, mutation in MUTATIONS.items():
            status.update(name)
            with mutate(name):
                caught = caught_by(quiet_report(*files))
            right = bool(caught.metrics) and caught.module == mutation.begins_at
            all_right = all_right and right
            verdict = "right" if right else f"WRONG: expected {mutation.begins_at}"
            table.add_row(name, *_cells(caught), verdict)
    console.print(table)
    return all_right


def _cells(caught: Caught) -> tuple[str, str]:
    return ", ".join(caught.metrics) or "nothing", caught.module or "none"
