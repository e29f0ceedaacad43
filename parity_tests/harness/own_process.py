"""Modules of the suite that need a process of their own: other devices, another platform."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lines_of(module: str, *arguments: str, env: Mapping[str, str] | None = None) -> list[str]:
    """What `python -m parity_tests.MODULE` prints, line by line; it must end well."""
    done = subprocess.run(
        (sys.executable, "-m", f"parity_tests.{module}", *arguments),
        cwd=ROOT,
        env=os.environ | dict(env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
