"""Fixtures of tests of runs: tiny data and a finished run."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from parity_tests.train.runs import Tiny, make_tiny, run_flags
from train.__main__ import main


@pytest.fixture(autouse=True)
def same_x64() -> Iterator[None]:
    """A program in float64 turns it on for the whole process."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, compiled_programs: Path) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), compiled_programs)


@pytest.fixture(scope="session")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps with checkpoints of steps 9 and 12. Copy it before use."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(run_flags(tiny, out)) == 0
    return out
