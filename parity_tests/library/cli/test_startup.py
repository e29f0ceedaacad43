"""What a program does before its other imports."""

import platform
import subprocess
import sys

import pytest

ALLOCATE_TWICE = """
import resource
import sys
import threading

import numpy as np

from llama_jax.cli.startup import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def allocate():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(100 << 20, np.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def twice():
    allocate()
    allocate()

thread = threading.Thread(target=twice)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
def test_memory_that_is_freed_is_used_again():
    """By a thread, as XLA's are: the system maps no new pages for it."""

    def page_faults(argument: str) -> list[int]:
        program = [sys.executable, "-c", ALLOCATE_TWICE, argument]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
        return [int(line) for line in done.stdout.split()]

    first, second = page_faults("keep")
    assert second < 0.1 * first
    # so that the test can fail; Linux may give huge pages
    first, second = page_faults("release")
    assert second > 0.5 * first
