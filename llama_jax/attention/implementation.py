"""Names of the attention implementations, in a module that command lines can import without JAX."""

from typing import Literal

Implementation = Literal["plain", "blocked", "cudnn", "splash", "triton"]
