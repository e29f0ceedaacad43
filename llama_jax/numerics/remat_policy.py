"""Names of the remat policies, in a module that command lines can import without JAX."""

from typing import Literal

Remat = Literal["none", "dots", "full"]
