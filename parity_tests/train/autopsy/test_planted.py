"""Faults planted in tiny runs are blamed first, and steps of undisturbed runs are not blamed.

Run it alone with `-s` for the tables. The seeds are not those that any threshold was chosen with (0 to 9).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.train.autopsy.planted import FAULTS, STEPS, judge, plant, undisturbed
from train.__main__ import main

pytestmark = pytest.mark.slow

RUNS = range(100, 110)  # of each fault
CALM, STEPS_OF_EACH = range(200, 210), 10
RIGHT = 0.9
# the first steps have too little before them to be judged
FIRST = 10


def autopsy(run: Path, step: int, *flags: str) -> dict[str, Any]:
    file = run.parent / f"{step}.json"
    assert main(["autopsy", str(run), str(step), f"--json={file}", "--horizon=0", *flags]) == 0
    return json.loads(file.read_text())


def test_planted_faults(tmp_path: Path) -> None:
    right = dict.fromkeys(FAULTS, 0)
    table = []
    for fault in FAULTS:
        for seed in RUNS:
            directory = tmp_path / f"{fault.replace(' ', '_')}{seed}"
            directory.mkdir()
            planted = plant(fault, seed, directory)
            found = autopsy(planted.run, planted.step, f"--history={planted.history}")
            correct = judge(planted, found)
            right[fault] += correct
            causes = found["causes"]
            first = f"{causes[0]['kind']}: {causes[0]['name']}" if causes else "none"
            table.append(
                f"{'right' if correct else 'WRONG'}  {fault} {seed} at {planted.step} ({planted.what}): "
                f"{first[:110]}"
            )
            print(table[-1], flush=True)
    print(right)
    assert sum(right.values()) >= RIGHT * len(FAULTS) * len(RUNS), "\n".join(table)


def test_undisturbed_steps(tmp_path: Path) -> None:
    blamed = []
    for seed in CALM:
        directory = tmp_path / str(seed)
        directory.mkdir()
        run = undisturbed(seed, directory)
        steps = np.random.default_rng(seed).choice(
            np.arange(FIRST, STEPS + 1), STEPS_OF_EACH, replace=False
        )
        for step in sorted(map(int, steps)):
            found = autopsy(run, step)
            assert found["replay"]["different"] == []
            if found["causes"]:
                blamed.append((seed, step, found["causes"]))
        print(
            f"run {seed}, steps {sorted(map(int, steps))}: blamed {len(blamed)} so far", flush=True
        )
    assert blamed == []
