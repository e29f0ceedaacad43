"""The two bars that everything numerical is held to; docs/parity.md has the rules that use them."""

FLOAT64_BAR = 1e-11
"""Largest relative error in float64. Rounding is about 1e-14 here, any difference of meaning far more."""

ROUNDING_RATIO = 1.25
"""In float32 and bfloat16: our rms error against the float64 reference over PyTorch's, at most."""
