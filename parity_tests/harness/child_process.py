"""Run a module of the suite in a process with other devices or another platform."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[2]


def output_lines(module: str, *arguments: str, env: Mapping[str, str] | None = None) -> list[str]:
    """The lines that `python -m parity_tests.MODULE` prints; its exit code must be 0.

    It reads and writes compiled programs where this process does.
    """
    cache = {
        name.upper(): str(getattr(jax.config, name))
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
        if jax.config.jax_compilation_cache_dir
    }
    result = subprocess.run(
        (sys.executable, "-m", f"parity_tests.{module}", *arguments),
        cwd=ROOT,
        env=os.environ | cache | dict(env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
