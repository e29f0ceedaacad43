"""What a CPU does not need is not imported."""

import subprocess
import sys

IMPORTED = """
import sys
import llama_jax.models.causal_lm
print(*(name for name in sys.modules if "pallas.ops.tpu" in name or "pallas.triton" in name))
"""


def test_kernels_for_other_platforms_are_imported_on_use() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == []
