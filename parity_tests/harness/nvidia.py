"""Is there an NVIDIA GPU, and can JAX use it? Asked in a process of its own, which leaves the GPU alone."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

CUDA = {"JAX_PLATFORMS": "cuda,cpu"}
"""Environment of a process that computes on the GPU."""

_KIND = "import jax; print(jax.devices('cuda')[0].device_kind)"


@functools.cache
def device_kind() -> str | None:
    """JAX's name of the first NVIDIA GPU, such as "NVIDIA H100 80GB HBM3"; None if there is none.

    Raises:
        RuntimeError: the machine has one, but JAX cannot use it.
    """
    if shutil.which("nvidia-smi") is None and not list(Path("/dev").glob("nvidia[0-9]*")):
        return None
    result = subprocess.run(
        (sys.executable, "-c", _KIND),
        env=os.environ | CUDA,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"JAX cannot use this machine's NVIDIA GPU ({last}); see docs/nvidia.md")
    return result.stdout.splitlines()[-1]
