"""The notebook in examples/ runs from top to bottom, offline, and is stored with its pictures."""

import json
import os
import subprocess
import sys

import pytest

from parity_tests.harness.child_process import ROOT

NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
# what Jupyter does with the cells: one namespace, one after another
RUN_CELLS = """
import json, sys
namespace = {"__name__": "__main__"}
for source in json.load(sys.stdin):
    exec(compile(source, "cell", "exec"), namespace)
"""


def test_notebook_has_pictures() -> None:
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
def test_notebook_runs(tmp_path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", RUN_CELLS],
        input=json.dumps(["".join(cell["source"]) for cell in CELLS]),
        cwd=NOTEBOOK.parent,
        env=os.environ | {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the weights are the same, bit for bit" in result.stdout
