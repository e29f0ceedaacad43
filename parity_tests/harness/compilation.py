"""How the tests compile."""

from typing import Any

import jax
import jax.numpy as jnp

# Compiles five times faster. For float64, where rounding does not matter; elsewhere the suite compiles what
# users compile, without options.
FAST_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones have no such option
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False

# the same, in XLA_FLAGS
FAST_FLAGS = tuple(f"--{name}={value}".lower() for name, value in FAST_COMPILE.items())


def compiler_options(dtype: Any) -> dict[str, Any]:
    """FAST_COMPILE for float64, and none otherwise."""
    return FAST_COMPILE if dtype == jnp.float64 else {}
