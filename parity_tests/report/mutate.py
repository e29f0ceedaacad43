"""P9 as a command: the report under every mutation must fail, and name the module that was broken."""

import io
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
from parity_tests.report.metrics import first_to_drift
from parity_tests.report.run import Report, report

# Small, with everything that a mutation touches: grouped heads, scaled rope of another theta, eps 1e-5.
CASE = BY_NAME["rope_llama31"]
LENGTH = 96  # past the scaling's original context


class Caught(NamedTuple):
    """metrics: which of them were beyond the tolerance. named: the first module to drift."""

    metrics: tuple[str, ...]
    named: str | None


def write_case(directory: Path) -> tuple[Path, Path]:
    """The case's checkpoint and a file of token ids for it."""
    checkpoint, tokens = directory / "checkpoint", directory / "tokens.npy"
    write_hf_directory(checkpoint, CASE.config, weights_of(CASE.config))
    np.save(tokens, np.random.default_rng(0).integers(0, CASE.config["vocab_size"], LENGTH))
    return checkpoint, tokens


def quiet_report(checkpoint: Path, tokens: Path) -> Report:
    return report(
        checkpoint,
        against=None,
        tokens=tokens,
        dtype="fp32",
        with_backward=True,
        console=Console(file=io.StringIO()),
    )


def caught_by(made: Report) -> Caught:
    metrics = dict.fromkeys(check.metric for check in made.checks if not check.holds)
    return Caught(tuple(metrics), first_to_drift(made.modules))


def mutate_all(console: Console) -> bool:
    """Print a line for each mutation, and for none; whether every one was caught and rightly named."""
    transformers.logging.disable_progress_bar()
    table = Table(box=SIMPLE_HEAD)
    table.add_column("mutation", no_wrap=True)
    table.add_column("caught by")
    table.add_column("first module to drift", no_wrap=True)
    table.add_column("")
    right = True
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        files = write_case(Path(folder))
        status.update("no mutation")
        clean = caught_by(quiet_report(*files))
        right = clean == Caught((), None)
        table.add_row("none", *_cells(clean), "right" if right else "WRONG")
        for name, mutation in MUTATIONS.items():
            status.update(name)
            with mutate(name):
                caught = caught_by(quiet_report(*files))
            good = bool(caught.metrics) and caught.named == mutation.begins_at
            right = right and good
            verdict = "right" if good else f"WRONG: {mutation.begins_at}"
            table.add_row(name, *_cells(caught), verdict)
    console.print(table)
    return right


def _cells(caught: Caught) -> tuple[str, str]:
    return ", ".join(caught.metrics) or "nothing", caught.named or "none"
