"""The compiled step that a run leaves for its next start."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.config import LlamaConfig
from llama_jax.numerics.cpu.available import loaded_kernels, may_have_flash_kernel
from parity_tests.train.runs import (
    CONFIG,
    Tiny,
    environment,
    finish,
    metrics_of,
    run_flags,
    same_bits,
    start,
    state_of,
)
from train.checkpoints import FOLDER
from train.options import OptimizerOptions, RunOptions
from train.program.build import initial_opt_state, initial_params, run_program
from train.run import kept_step
from train.run.kept_step import keep_step, kept_step_file, load_step

STEPS = 12
TRACED = "Finished tracing step for jit"


class Started(NamedTuple):
    """A run that has ended, and what it left in an empty cache of compiled programs."""

    run: Path
    cache: Path
    variables: dict[str, str]

    @property
    def kept(self) -> list[Path]:
        return list(self.cache.glob("*/steps/*"))

    def again(self, run: Path, *more: str) -> str:
        """Resume a copy of the run without its last checkpoint; what that says."""
        shutil.copytree(self.run, run)
        shutil.rmtree(run / FOLDER / str(STEPS))
        return finish(start(["resume", str(run), *more], self.variables))


@pytest.fixture(scope="module")
def started(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Started:
    folder = tmp_path_factory.mktemp("kept")
    run, cache = folder / "run", folder / "cache"
    variables = environment(None) | {"LLAMA_JAX_CACHE": str(cache), "JAX_LOG_COMPILES": "1"}
    assert TRACED in finish(start(run_flags(tiny, run, steps=STEPS), variables))
    return Started(run, cache, variables)


def test_the_next_start_does_not_trace_it(started: Started, tmp_path: Path) -> None:
    """And computes the same bits."""
    (file,) = started.kept
    assert file.parent.stat().st_mode & 0o077 == 0
    assert TRACED not in started.again(tmp_path / "run")
    assert metrics_of(tmp_path / "run") == metrics_of(started.run)
    assert same_bits(state_of(tmp_path / "run", STEPS), state_of(started.run, STEPS))
    assert started.kept == [file]


@pytest.mark.skipif(not may_have_flash_kernel(), reason="no numba or no AVX-512")
def test_the_next_start_has_the_kernels_of_a_long_step(tiny: Tiny, tmp_path: Path) -> None:
    """Those of attention are for sequences of 1,024 tokens, of which heads are 32 wide."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"head_dim": 32, "max_position_embeddings": 1024}))
    run, cache = tmp_path / "run", tmp_path / "cache"
    variables = environment(None) | {"LLAMA_JAX_CACHE": str(cache), "JAX_LOG_COMPILES": "1"}
    lengths = {"sequence_length": 1024, "batch_size": 1, "evaluation__every": 0}
    long = tiny._replace(config=config)
    finish(start(run_flags(long, run, steps=STEPS, **lengths), variables))
    first = Started(run, cache, variables)
    assert TRACED not in first.again(tmp_path / "again")
    assert same_bits(state_of(tmp_path / "again", STEPS), state_of(run, STEPS))


@pytest.mark.parametrize("change", ["option", "variable", "damage"])
def test_a_step_that_does_not_fit_is_compiled(
    started: Started, tmp_path: Path, change: str
) -> None:
    (file,) = started.kept
    content = file.read_bytes()
    more: list[str] = []
    if change == "option":
        more = ["--model.scan-unroll=2"]
    elif change == "variable":
        started = started._replace(
            variables=started.variables | {"XLA_PYTHON_CLIENT_PREALLOCATE": "1"}
        )
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert TRACED in started.again(tmp_path / "run", *more)
    finally:
        file.write_bytes(content)
        for other in {*started.kept} - {file}:
            other.unlink()
    if change != "option":
        assert same_bits(state_of(tmp_path / "run", STEPS), state_of(started.run, STEPS))


def test_a_program_that_was_read_is_not_written(started: Started, tmp_path: Path) -> None:
    """XLA would write one that cannot be run."""
    (file,) = started.kept
    content = file.read_bytes()
    file.unlink()
    try:
        assert TRACED in started.again(tmp_path / "run")
        assert not started.kept
    finally:
        file.write_bytes(content)


OPTIONS = replace(RunOptions(), steps=4, batch_size=2, sequence_length=16)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where steps are kept, as `python -m train` has it."""
    monkeypatch.setattr(kept_step, "program_folder", lambda: tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="train.__main__"))
    return tmp_path


def file_of(options: RunOptions = OPTIONS, name: str = "step", **config: Any) -> Path | None:
    model = LlamaConfig.from_dict(CONFIG | config)
    return kept_step_file(run_program(options, model), options, name, None)


def test_what_the_key_is_of(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = replace(OPTIONS, out=Path("elsewhere"), seed=3, export_every=2)
    files = [file_of(), file_of(elsewhere)]
    assert files[0] == files[1]
    changed = [
        replace(OPTIONS, steps=5),
        replace(OPTIONS, batch_size=4),
        replace(OPTIONS, deterministic=True),
        replace(OPTIONS, optimizer=OptimizerOptions(beta2=0.9)),
        replace(OPTIONS, optimizer=OptimizerOptions(learning_rate=1e-5)),
        replace(OPTIONS, model=replace(OPTIONS.model, attention="plain")),
        replace(OPTIONS, model=replace(OPTIONS.model, compute_dtype="bfloat16")),
    ]
    files += [file_of(options) for options in changed]
    files += [file_of(name="statistics_step"), file_of(rms_norm_eps=1e-6)]
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        files.append(file_of())
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    files.append(file_of())
    monkeypatch.setattr(jax, "__version__", "0")
    files.append(file_of())
    # a source
    copy = tmp_path / "llama_jax"
    shutil.copytree(Path(llama_jax.__file__).parent, copy, ignore=shutil.ignore_patterns("__*__"))
    package = ModuleType("llama_jax")
    package.__file__ = str(copy / "config.py")
    monkeypatch.setattr(kept_step, "llama_jax", package)
    assert file_of() == files[-1]
    (copy / "loss/scan.py").write_text("# another")
    files.append(file_of())
    assert len(set(files)) == len(files) - 1
    assert all(file is not None and file.parent == folder / "steps" for file in files)


def test_no_other_program_keeps_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert file_of() is None


def test_written_and_read(folder: Path) -> None:
    config = LlamaConfig.from_dict(CONFIG)
    program = run_program(OPTIONS, config)
    file = kept_step_file(program, OPTIONS, "step", None)
    assert file is not None
    assert load_step(file, program) is None
    compiled = program.step.lower(program.params, program.opt_state, program.batch, None).compile()
    keep_step(file, compiled, loaded_kernels())
    results = []
    for step in (program.step, load_step(file, program)):
        assert step is not None
        params = initial_params(program, 0)
        state = initial_opt_state(program, params)
        batch = jax.tree.map(
            lambda leaf: jax.device_put(np.ones(leaf.shape, np.int32), leaf.sharding), program.batch
        )
        results.append(jax.tree.leaves(step(params, state, batch, None)))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert same_bits(*([np.asarray(leaf) for leaf in result] for result in results))

    content = file.read_bytes()
    other = pickle.dumps(([], b"", None, None))
    for damaged in (b"", content[:-1], content[:40], hashlib.sha256(other).digest() + other):
        file.write_bytes(damaged)
        assert load_step(file, program) is None
    file.write_bytes(content)
    assert load_step(file, program) is not None
    file.parent.chmod(0o777)  # somebody else could have written it
    assert load_step(file, program) is None


def test_old_steps_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_step, "serialize", lambda compiled: (compiled, None, None))
    compiled: Any = b"code"
    for number in range(20):
        keep_step(folder / "steps" / str(number), compiled, [])
    left = {path.name for path in (folder / "steps").iterdir()}
    assert len(left) == 16
    assert "19" in left


def test_what_cannot_be_written_is_not_kept(folder: Path) -> None:
    (folder / "steps").touch()
    compiled: Any = None
    keep_step(folder / "steps/key", compiled, [])
