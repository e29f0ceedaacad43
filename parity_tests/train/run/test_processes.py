"""Whether a run is one of several processes, and what depends on it."""

import argparse
from dataclasses import replace

import pytest

from train import __main__ as program
from train.options import DistributedOptions, RunOptions
from train.run.processes import has_other_processes

ALONE = DistributedOptions()
SEVERAL = DistributedOptions(enabled=True), DistributedOptions(coordinator="host:1", processes=2)


def test_either_option_says_so():
    assert not has_other_processes(ALONE)
    assert all(map(has_other_processes, SEVERAL))


@pytest.mark.parametrize("distributed", [ALONE, *SEVERAL], ids=["alone", "enabled", "coordinator"])
@pytest.mark.parametrize("asked", [{}, {"cache": "DIR"}, {"no_cache": True}], ids=str)
def test_several_processes_share_no_cache_unless_asked(monkeypatch, distributed, asked):
    kept = []
    monkeypatch.setattr(program, "keep_compiled_programs", kept.append)
    arguments = argparse.Namespace(**{"cache": None, "no_cache": False} | asked)
    program._keep_compiled_programs(replace(RunOptions(), distributed=distributed), arguments)
    assert bool(kept) == (bool(asked) or distributed == ALONE)
