"""The trials of the transfer benchmark are runs, and where its parabola is least."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import transfer
from llama_jax import LlamaConfig
from parity_tests.train.runs import CONFIG, make_tiny
from train.data.placement import placed_batches
from train.data.sources import find_sources
from train.options import EvaluationOptions, ModelOptions, OptimizerOptions, RunOptions
from train.program.build import initial_opt_state, initial_params, run_program
from train.run.training_data import training_windows


def test_a_trial_is_a_run_with_that_rate(tmp_path: Path) -> None:
    rate = 1e-2
    options = RunOptions(
        data=(str(make_tiny(tmp_path).data),),
        seed=3,
        steps=4,
        batch_size=2,
        sequence_length=16,
        model=ModelOptions(
            parametrization="mup",
            mup_base_hidden_size=16,
            mup_base_kv_heads=1,
            compute_dtype="float32",
        ),
        optimizer=OptimizerOptions(learning_rate=rate, warmup_steps=1),
        evaluation=EvaluationOptions(every=0),
    )
    config = LlamaConfig.from_dict(CONFIG | {"num_hidden_layers": 1})
    sources = find_sources(options.data)
    program = run_program(options, config, jax.devices()[:1])
    data = training_windows(options, config, sources)
    with jax.set_mesh(program.mesh), closing(placed_batches(program.batch, data)) as batches:
        params = initial_params(program, options.seed)
        state = initial_opt_state(program, params)
        for _ in range(options.steps):
            params, state, metrics = program.step(params, state, next(batches), None)
    other, same = transfer.losses(options, config, sources, [rate / 3, rate], [options.seed])[0]
    assert same == pytest.approx(float(metrics.loss), rel=1e-5)
    assert other != pytest.approx(float(metrics.loss), rel=1e-3)


def test_the_best_rates() -> None:
    rates = [1e-3, 2e-3, 4e-3, 8e-3]
    means = np.log(np.array(rates) / 3e-3) ** 2
    assert transfer.minimum(rates, means) == pytest.approx(3e-3)
    assert np.isnan(transfer.minimum(rates, -means))
    report = transfer.tabulate([64, 128], rates, np.array([means, means[::-1]]))
    marked = [[cell.endswith("*") for cell in row[1:]] for row in report.rows]
    assert marked == [[False, False], [False, True], [True, False], [False, False], [False, False]]
    assert report.rows[-1] == ["parabola's minimum", "0.003", "0.00267"]
