"""Loading needs the memory of one model and little more."""

from dataclasses import replace

import pytest

from benchmarks.load_time import ALLOWANCE, CONFIG, measure_load
from benchmarks.random_checkpoint import write_random


@pytest.mark.slow
def test_peak_memory_of_loading_a_bfloat16_directory(tmp_path):
    """Peak RSS <= model bytes + 2 x the largest tensor + the allowance, in a separate process.

    The model is large enough that holding it twice would break the law.
    """
    specs = write_random(replace(CONFIG, num_hidden_layers=12), tmp_path)
    total, largest = sum(s.nbytes for s in specs), max(s.nbytes for s in specs)
    assert total > 2 * largest + ALLOWANCE
    assert measure_load(tmp_path)["peak"] <= total + 2 * largest + ALLOWANCE
