"""How the tests compile."""

from typing import Any

import jax.numpy as jnp

# Compiles five times faster. For float64, where rounding does not matter; elsewhere the suite compiles what
# users compile, without options.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def compiler_options(dtype: Any) -> dict[str, Any]:
    """FAST_COMPILE for float64, and none otherwise."""
    return FAST_COMPILE if dtype == jnp.float64 else {}
