"""RoPE: Hugging Face's `rope_parameters` from GGUF, and GGUF's two mechanisms from them.

llama.cpp has two mechanisms. Metadata: `rope.scaling.type` none, linear or yarn with their factors.
And a tensor, `rope_freqs.weight` [head_dim / 2], by whose entries the inverse frequencies are divided:
its converter evaluates Llama 3's scaling into that tensor and keeps no constants. Hugging Face needs the
constants, so they are recovered here, and only used if they reproduce the tensor.

Of yarn's constants, `llama` reads the factor, the original context and the factor on cos and sin; its ramp
is that of beta_fast 32 and beta_slow 1 whatever the file says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from convert.formats.gguf.keys import Keys
from llama_jax.config import LlamaConfig
from llama_jax.numerics.rope import inverse_frequencies

_PUBLISHED = [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)]  # Llama 3.1, Llama 3.2
# On the reciprocals, which are interpolated linearly: the tensor was computed in float32 from float32
# frequencies, so a few of its roundings (2**-24 each) lie between it and float64.
_TOLERANCE = 2.0**-21


# --- reading -----------------------------------------------------------------------------------------


def read_rope(
    keys: Keys,
    factors: Float32[np.ndarray, " half"] | None,
    *,
    head_dim: int,
    context_length: int,
) -> dict[str, Any]:
    """`rope_parameters` of a GGUF Llama; problems are added to `keys`.

    Args:
        keys: reads below `llama.`.
        factors: `rope_freqs.weight`; None where there is no such tensor.
    """
    theta = keys.number("rope.freq_base", 10000.0)
    if not theta > 0.0:
        keys.problems.append(f"llama.rope.freq_base is {theta}, expected above 0")
        return {}
    parameters = metadata_scaling(keys, context_length)
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if factors is None:
        if attention_factor != 1.0 and parameters["rope_type"] != "yarn":
            keys.problems.append(
                f"llama.rope.scaling.attn_factor is {attention_factor}, "
                "expected 1 without yarn or rope_freqs.weight"
            )
        return {**parameters, "rope_theta": theta}
    if not (np.isfinite(factors) & (factors > 0)).all():
        keys.problems.append("rope_freqs.weight has values that are not positive and finite")
        return {}
    from_tensor = tensor_scaling(
        factors,
        head_dim=head_dim,
        theta=theta,
        context_length=context_length,
        attention_factor=attention_factor,
    )
    if from_tensor["rope_type"] != "default":
        if parameters["rope_type"] != "default":
            keys.problems.append(
                f"rope.scaling.type {parameters['rope_type']} and rope_freqs.weight are both present, "
                "expected one: Hugging Face cannot combine them"
            )
        parameters = from_tensor
    return {**parameters, "rope_theta": theta}


def metadata_scaling(keys: Keys, context_length: int) -> dict[str, Any]:
    """`rope_parameters` without theta, from the `rope.scaling.*` metadata.

    Defaults are llama.cpp's: a missing type is linear, a missing factor is none at all.
    """
    kind = keys.string("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    if kind not in ("none", "linear", "yarn"):
        keys.problems.append(f"rope.scaling.type is {kind!r}, expected none, linear or yarn")
    if factor < 0 and kind != "none":
        keys.problems.append(f"rope.scaling.factor is {factor:g}, expected a positive number")
    elif kind == "yarn":
        return _yarn(keys, factor or 1.0, context_length)
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    return {"rope_type": "default"}


def _yarn(keys: Keys, factor: float, context_length: int) -> dict[str, Any]:
    original = keys.integer("rope.scaling.original_context_length", context_length)
    parameters = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    # llama.cpp multiplies these two and its own mscale; Hugging Face's field replaces the product
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    attention_factor *= keys.number("rope.scaling.yarn_attn_factor", 1.0)
    if attention_factor != 1.0:
        parameters["attention_factor"] = attention_factor * _yarn_mscale(factor)
    for key, neutral in [("yarn_ext_factor", (1.0, -1.0)), ("yarn_log_multiplier", (0.0,))]:
        value = keys.number(f"rope.scaling.{key}", neutral[0])
        if value not in neutral:
            keys.problems.append(
                f"rope.scaling.{key} is {value}, expected {neutral[0]}: Hugging Face has no such field"
            )
    return parameters


def _yarn_mscale(factor: float) -> float:
    """What llama.cpp multiplies cos and sin by on its own under yarn."""
    return 0.1 * math.log(factor) + 1.0


def tensor_scaling(
    factors: Float32[np.ndarray, " half"],
    *,
    head_dim: int,
    theta: float,
    context_length: int,
    attention_factor: float,
) -> dict[str, Any]:
    """`rope_parameters` without theta, from `rope_freqs.weight` [head_dim / 2].

    Llama 3's constants where they reproduce the tensor to float32 rounding; otherwise, and where cos and
    sin are multiplied by `attention_factor`, longrope with the tensor itself as both factor lists, which
    divides by it in the same way.
    """
    if attention_factor == 1.0:
        if (factors == 1.0).all():
            return {"rope_type": "default"}
        if (factors == factors[0]).all():
            return {"rope_type": "linear", "factor": float(str(factors[0]))}
        frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        for factor, low, high, original in _candidates(factors.astype(np.float64), frequencies):
            exact = llama3_factors(frequencies, factor, low, high, original)
            if np.allclose(1.0 / exact, 1.0 / factors, rtol=_TOLERANCE, atol=_TOLERANCE):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    shortest = [float(str(factor)) for factor in factors]
    return {
        "rope_type": "longrope",
        "short_factor": shortest,
        "long_factor": shortest,
        "attention_factor": attention_factor,
        "factor": 1.0,
        "original_max_position_embeddings": context_length,
    }


def llama3_factors(
    frequencies: Float64[np.ndarray, " half"],
    factor: float,
    low: float,
    high: float,
    original: int,
) -> Float64[np.ndarray, " half"]:
    """What Llama 3's scaling divides each inverse frequency by.

    Short wavelengths are left alone, long ones divided by `factor`, and between them the reciprocal
    is interpolated in the number of turns made within the original context.
    """
    turns = original * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _candidates(
    factors: Float64[np.ndarray, " half"], frequencies: Float64[np.ndarray, " half"]
) -> Iterator[tuple[float, float, float, int]]:
    """(factor, low, high, original) worth trying, the likeliest first."""
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


# --- writing -----------------------------------------------------------------------------------------


def rope_scaling(config: LlamaConfig) -> tuple[dict[str, Any], Float32[np.ndarray, " half"] | None]:
    """The `rope.scaling.*` metadata, and `rope_freqs.weight` where each frequency has its own divisor.

    Metadata where llama.cpp has the formula; the tensor for all other frequencies that stay the same at
    every length.

    Raises:
        ValueError: frequencies that depend on the current length, or are zero.
    """
    rope = config.rope
    shape = config.head_size, config.max_position_embeddings
    frequencies, attention_factor = inverse_frequencies(rope, *shape, length=1)
    if not np.array_equal(frequencies, inverse_frequencies(rope, *shape, length=2**31)[0]):
        raise ValueError(
            f"rope_type: found {rope['rope_type']!r} with frequencies that depend on the current length, "
            "expected constant ones: GGUF's llama has no others"
        )
    if not np.all(frequencies):
        raise ValueError(
            f"rope_type: found {rope['rope_type']!r} with features that are not rotated, expected none: "
            "GGUF's llama rotates the whole head"
        )
    match rope["rope_type"]:
        case "default":
            return {}, None
        case "linear":
            return _scaling_metadata({"type": "linear", "factor": float(rope["factor"])}), None
        case "yarn" if _is_llama_cpp_yarn(rope):
            scaling = {
                "type": "yarn",
                "factor": float(rope["factor"]),
                "original_context_length": int(rope["original_max_position_embeddings"]),
            }
            attention_factor /= _yarn_mscale(rope["factor"])
            return _scaling_metadata(scaling, attention_factor), None
    exponents = np.arange(0, config.head_size, 2, dtype=np.float64) / config.head_size
    factors = float(rope["rope_theta"]) ** -exponents / frequencies
    return _scaling_metadata({}, attention_factor), factors.astype(np.float32)


def _is_llama_cpp_yarn(rope: Mapping[str, Any]) -> bool:
    """Whether yarn's constants are those of llama.cpp's formula."""
    context = rope["original_max_position_embeddings"]
    ramp = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True)
    return ramp == (32, 1, True) and context == int(context) and rope["factor"] >= 1


def _scaling_metadata(scaling: dict[str, Any], attention_factor: float = 1.0) -> dict[str, Any]:
    """The metadata, with a factor on cos and sin where it is not 1."""
    if not math.isclose(attention_factor, 1.0, rel_tol=1e-12):
        scaling = {**scaling, "attn_factor": attention_factor}
    return {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
