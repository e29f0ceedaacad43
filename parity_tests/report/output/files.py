"""Write a report to files; each appears under its name only when it is complete."""

import json
import math
from pathlib import Path
from typing import Any

from llama_jax.files.staging import replacing, write_text
from parity_tests.report.output.page import page
from parity_tests.report.output.tables import to_json
from parity_tests.report.run import Report


def write_json(report: Report, path: Path) -> None:
    """Every number of the report. JSON has no NaN or infinity: they are null."""
    _write(path, json.dumps(_finite(to_json(report)), indent=1, allow_nan=False) + "\n")


def write_html(report: Report, path: Path) -> None:
    """One page with tables and pictures, which needs no other file."""
    _write(path, page(report))


def _write(path: Path, text: str) -> None:
    with replacing(path) as staged:
        write_text(staged, text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
