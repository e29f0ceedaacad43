"""What a recorded program rounds to, by its manifest."""

from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoints.safetensors_read import STORED_DTYPES
from parity_tests.traces.our_sections import Precision
from parity_tests.traces.trace import MANIFEST, Trace

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_MATMULS = ("float32", "tf32", "bfloat16_3x", "bfloat16")


def precision_of(trace: Trace) -> Precision:
    """The precision that the manifest tells.

    Autocast rounds operands and results of matmuls. Without it, a program whose projections are in half
    precision computes in half precision, whatever its weights are.

    Raises:
        ValueError: a dtype or a setting that is not known.
    """
    stated = trace.manifest["precision"]
    widest = max(
        (_dtype(trace, "parameters", name) for name in str(stated.get("parameters")).split()),
        key=lambda dtype: dtype.itemsize,
    )
    autocast, operands = stated.get("autocast"), stated.get("matmul") or "float32"
    if operands not in _MATMULS:
        raise ValueError(
            f"{trace.folder / MANIFEST}: precision.matmul: found {operands!r}, expected "
            f"{', '.join(_MATMULS)}"
        )
    if autocast:
        _dtype(trace, "autocast", autocast)
        return Precision(widest, np.dtype(np.float32), autocast, autocast)
    projections = [
        STORED_DTYPES[stored.dtype]
        for array, stored in trace.stored.items()
        if array.endswith("_proj.output")
    ]
    compute = min((widest, *projections), key=lambda dtype: dtype.itemsize)
    if compute.itemsize != np.dtype(np.float32).itemsize:
        operands = "float32"  # not rounded further
    return Precision(widest, compute, operands)


def describe(precision: Precision) -> str:
    """In a few words.

    >>> describe(Precision(DTYPES["float32"], DTYPES["float32"], "tf32"))
    'float32, matmuls in tf32'
    """
    text = precision.compute.name
    if precision.parameters != precision.compute:
        text += f", weights in {precision.parameters.name}"
    if precision.results != "float32":
        return f"{text}, matmuls in {precision.operands} (autocast)"
    return text if precision.operands == "float32" else f"{text}, matmuls in {precision.operands}"


def _dtype(trace: Trace, key: str, name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(
            f"{trace.folder / MANIFEST}: {key}: found {name!r}, expected {', '.join(DTYPES)}"
        )
    return DTYPES[name]
