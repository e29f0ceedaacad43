"""The rotary embedding a GGUF Llama describes, as Hugging Face's `rope_parameters`.

llama.cpp has two mechanisms. Metadata: `rope.scaling.type` none, linear or yarn with their factors.
And a tensor, `rope_freqs.weight` [head_dim / 2], by whose entries the inverse frequencies are divided:
its converter works Llama 3's scaling out into that tensor and keeps no constants. Hugging Face wants
the constants, so they are found again here, and only believed when they give the same tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

_PUBLISHED = [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)]  # Llama 3.1, Llama 3.2
# On the reciprocals, which are interpolated linearly: the tensor was worked out in float32 from
# float32 frequencies, so a few of its roundings (2**-24 each) lie between it and float64.
_TOLERANCE = 2.0**-21


def metadata_scaling(keys: Any, context_length: int) -> dict[str, Any]:
    """`rope_parameters` without theta, from the `rope.scaling.*` metadata.

    `keys` reads metadata below the architecture and collects faults (see `convert.formats.gguf.read`).
    Defaults are llama.cpp's: a missing type is linear, a missing factor is none at all.
    """
    kind = keys.string("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    if kind not in ("none", "linear", "yarn"):
        keys.faults.append(f"rope.scaling.type is {kind!r}, expected none, linear or yarn")
    if factor < 0 and kind != "none":
        keys.faults.append(f"rope.scaling.factor is {factor:g}, expected a positive number")
    elif kind == "yarn":
        return _yarn(keys, factor or 1.0, context_length)
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    return {"rope_type": "default"}


def _yarn(keys: Any, factor: float, context_length: int) -> dict[str, Any]:
    original = keys.integer("rope.scaling.original_context_length", context_length)
    parameters = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    # llama.cpp multiplies its own 0.1 ln(factor) + 1 by this; Hugging Face's field replaces the product.
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    attention *= keys.number("rope.scaling.yarn_attn_factor", 1.0)
    if attention != 1.0:
        parameters["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    for key, neutral in [("yarn_ext_factor", (1.0, -1.0)), ("yarn_log_multiplier", (0.0,))]:
        if keys.number(f"rope.scaling.{key}", neutral[0]) not in neutral:
            keys.faults.append(
                f"rope.scaling.{key} is {keys.number(f'rope.scaling.{key}', 0.0)}, "
                f"expected {neutral[0]}: Hugging Face has no such field"
            )
    return parameters


def tensor_scaling(
    factors: np.ndarray, *, head_dim: int, theta: float, context_length: int, attention: float
) -> dict[str, Any]:
    """`rope_parameters` without theta, from `rope_freqs.weight`, float32 [head_dim / 2].

    Llama 3's constants where they reproduce the tensor to float32 rounding; otherwise, and where cos and
    sin are multiplied by `attention`, longrope with the tensor itself as both factor lists, which divides
    by it just so.
    """
    if attention == 1.0 and (factors == 1.0).all():
        return {"rope_type": "default"}
    if attention == 1.0 and (factors == factors[0]).all():
        return {"rope_type": "linear", "factor": float(str(factors[0]))}
    factors = factors.astype(np.float32)
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    candidates = _candidates(factors.astype(np.float64), frequencies) if attention == 1.0 else ()
    for factor, low, high, original in candidates:
        found = llama3_factors(frequencies, factor, low, high, original)
        if np.allclose(1.0 / found, 1.0 / factors, rtol=_TOLERANCE, atol=_TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    shortest = [float(str(f)) for f in factors]
    return {
        "rope_type": "longrope",
        "short_factor": shortest,
        "long_factor": shortest,
        "attention_factor": attention,
        "factor": 1.0,
        "original_max_position_embeddings": context_length,
    }


def llama3_factors(
    frequencies: np.ndarray, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """What Llama 3's scaling divides each inverse frequency by, float64 [head_dim / 2].

    Short wavelengths are left alone, long ones divided by `factor`, and between them the reciprocal
    is interpolated in the number of turns made within the original context.
    """
    turns = original * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _candidates(
    factors: np.ndarray, frequencies: np.ndarray
) -> Iterator[tuple[float, float, float, int]]:
    """Constants worth trying, the likeliest first."""
    yield from _PUBLISHED
    factor = float(np.float32(factors.max()))
    if factor <= 1.0:
        return
    for power in range(9, 21):
        yield factor, 1.0, 4.0, 2**power
    # Between the two bounds the interpolation weight is a line in the frequency: slope
    # original / (2 pi (high - low)), intercept -low / (high - low). The three scale together, so low
    # may be taken as 1.
    inside = (factors > 1.0) & (factors < factor)
    if inside.sum() >= 2:
        smooth = (1.0 / factors[inside] - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, intercept = np.polyfit(frequencies[inside], smooth, 1)
        if intercept < 0.0 < slope:
            high = 1.0 - 1.0 / float(intercept)
            original = round(float(slope) * 2 * math.pi * (high - 1.0))
            for digits in (0, 1, 2, 4):
                if original > 0 and round(high, digits) > 1.0:
                    yield factor, 1.0, round(high, digits), original
