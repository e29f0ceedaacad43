"""MaxText's forward pass, recorded by its own interpreter, is that of the checkpoint it was given."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import convert
from parity_tests.convert.formats.maxtext.test_maxtext import (
    MAXTEXT_PYTHON,
    RUN,
    TOKENS,
    tiny_model,
)
from parity_tests.harness.child_process import ROOT
from parity_tests.traces.check import check


@pytest.mark.slow
@pytest.mark.skipif(
    MAXTEXT_PYTHON is None, reason="MAXTEXT_PYTHON names no interpreter with MaxText"
)
@pytest.mark.parametrize("theta", [10000.0, 20000.0])
def test_maxtext(theta: float, tmp_path: Path) -> None:
    """With another theta in its settings it is not."""
    tiny_model(vocab_size=64, tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    out = convert.convert(tmp_path / "model", tmp_path / "out", to="maxtext")
    np.save(tmp_path / "tokens.npy", TOKENS.astype(np.int32))
    settings = f"load_parameters_path={out / '0/items'}", f"rope_max_timescale={theta:g}"
    arguments = tmp_path / "tokens.npy", tmp_path / "trace", out / "config.yml", *settings
    assert MAXTEXT_PYTHON is not None
    done = subprocess.run(
        [MAXTEXT_PYTHON, "-m", "parity_tests.workers.maxtext_trace", *arguments, *RUN.split()],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    verdict = check(tmp_path / "trace", tmp_path / "model")
    assert len(verdict.values) == 2 * 8 + 2
    assert verdict.holds == (theta == 10000.0)
    if theta != 10000.0:
        assert verdict.departures[0].name == "layers.0.self_attn.rotate.q"
