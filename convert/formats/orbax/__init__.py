"""Orbax checkpoints: what `python -m train` saves, and converted weights that any JAX program restores.

A converted directory has config.json, the tokenizer and `params/`, which
`ocp.StandardCheckpointer().restore(DIR / "params", abstract)` reads onto any mesh. The arrays are the
model's own: each holds a tensor, or the stack of all layers' tensors.
"""

from convert.formats.orbax.read import read
from convert.formats.orbax.write import target_specs, write
from convert.formats.plain import cast_rule, losses, stored_bytes
from llama_jax.checkpoints.orbax import is_orbax as recognizes

__all__ = [
    "cast_rule",
    "losses",
    "read",
    "recognizes",
    "stored_bytes",
    "target_specs",
    "write",
]
