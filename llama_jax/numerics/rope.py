"""Rotary position embeddings: the inverse frequencies of every `rope_type`, their cos/sin, the rotation.

Sources: RoFormer (arXiv:2104.09864); position interpolation (arXiv:2306.15595) = `linear`; NTK-aware
scaling = `dynamic`; YaRN (arXiv:2309.00071); LongRoPE (arXiv:2402.13753); `llama3` as in Meta's
llama-models `apply_scaling`; `proportional` as in transformers v5. The constants and their defaults are
those of `transformers.modeling_rope_utils`.

Frequencies are constants of the model: they are computed in float64 with numpy and rounded once to the
working precision, so their error never exceeds that of transformers, which computes them in float32. Only
what depends on the current length (`dynamic`, `longrope`) is traced.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.numerics.matmul import working_dtype

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "proportional": (),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor"),
    "proportional": ("factor",),
}
_ALWAYS = ("rope_theta", "partial_rotary_factor")
_KNOWN = {
    *(name for names in (*_REQUIRED.values(), *_OPTIONAL.values()) for name in names),
    *("rope_type", *_ALWAYS),
    "finetuned",  # written by some exporters, read by nobody
}
_MAY_BE_ZERO = {"partial_rotary_factor", "mscale", "mscale_all_dim", "attention_factor"}


def validate_rope_parameters(
    rope: Mapping[str, Any], head_dim: int, max_position_embeddings: int
) -> None:
    """Raise ValueError unless `rope` is complete and has finite frequencies."""
    rope_type = rope["rope_type"]
    if not isinstance(rope_type, str) or rope_type not in _REQUIRED:
        raise ValueError(
            f"rope_type: found {rope_type!r}, expected one of {', '.join(map(repr, _REQUIRED))}"
        )
    for name in _REQUIRED[rope_type]:
        if rope.get(name) is None:
            raise ValueError(f"rope_parameters[{name!r}]: missing for rope_type {rope_type!r}")
    # parameters of another rope_type, or of none, are ignored as in transformers, which warns
    used = (*_ALWAYS, *_REQUIRED[rope_type], *_OPTIONAL.get(rope_type, ()))
    for name, value in ((name, rope[name]) for name in used if name in rope):
        if name == "truncate":
            continue
        if name in ("short_factor", "long_factor"):
            _require_factors(name, value, head_dim // 2)
        elif not _is_positive(value) and not (value == 0 and name in _MAY_BE_ZERO):
            raise ValueError(f"rope_parameters[{name!r}]: found {value!r}, expected a number > 0")
    fraction = rope.get("partial_rotary_factor", 1.0)
    # `default` ignores the fraction in transformers' Llama, `proportional` applies it within the head;
    # the others produce cos/sin too narrow for the head and cannot run there.
    if rope_type not in ("default", "proportional") and int(head_dim * fraction) != head_dim:
        raise ValueError(
            f"partial_rotary_factor: found {fraction}, expected 1.0: transformers' Llama cannot run "
            f"rope_type {rope_type!r} on a part of the head"
        )
    if rope_type == "proportional" and fraction > 1:
        raise ValueError(f"partial_rotary_factor: found {fraction}, expected at most 1.0")
    if rope_type == "dynamic" and head_dim <= 2:
        raise ValueError(f"head_dim: found {head_dim}, expected more than 2 for 'dynamic' rope")
    try:
        # parameters that are in range can still divide by zero or overflow together
        with np.errstate(all="ignore"):
            computed = inverse_frequencies(rope, head_dim, max_position_embeddings, 1)
        is_finite = all(np.isfinite(part).all() for part in computed)
    except (ArithmeticError, ValueError):
        is_finite = False
    if not is_finite:
        raise ValueError(f"rope_parameters: found {dict(rope)}, which has no finite frequencies")


def unknown_constants(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `rope` that no `rope_type` uses, by name."""
    return {name: rope[name] for name in sorted(rope.keys() - _KNOWN)}


def inverse_frequencies(
    rope: Mapping[str, Any],
    head_dim: int,
    max_position_embeddings: int,
    length: int | Int[Array, ""],
) -> tuple[Float[np.ndarray, " half"] | Float[Array, " half"], float]:
    """Inverse frequencies (radians per position) and the factor on cos and sin.

    Args:
        rope: `rope_type`, `rope_theta` and the parameters of the type.
        head_dim: features of a head; there are half as many frequencies.
        max_position_embeddings: the context beyond which `dynamic` scales.
        length: the current length, highest position + 1, which may be traced; only for `dynamic` and
            `longrope`.

    Returns:
        Frequencies as float64 numpy, or as a traced array if they depend on a traced `length`; the factor.
    """
    theta = float(rope["rope_theta"])
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = theta**-exponents
    match rope["rope_type"]:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / rope["factor"], 1.0
        case "proportional":
            rotated = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
            kept = np.where(np.arange(head_dim // 2) < rotated, plain, 0.0)
            return kept / rope.get("factor", 1.0), 1.0
        case "llama3":
            return _llama3(plain, rope), 1.0
        case "yarn":
            return _yarn(plain, rope, head_dim, max_position_embeddings)
        case "longrope":
            return _longrope(plain, rope, max_position_embeddings, length)
        case "dynamic":
            return _dynamic(plain, rope["factor"], head_dim, max_position_embeddings, length), 1.0
        case other:
            raise AssertionError(f"rope_type {other!r} was not validated")


def rope_cos_sin(
    position_ids: Int[Array, "batch seq"],
    rope: Mapping[str, Any],
    head_dim: int,
    max_position_embeddings: int,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """cos and sin of the rotation angles, computed in float32 (float64 for float64) and cast to `dtype`.

    The length that `dynamic` and `longrope` depend on is the highest position of the batch + 1, as in
    transformers.
    """
    working = working_dtype(dtype)
    length = jnp.max(position_ids) + 1
    frequencies, factor = inverse_frequencies(rope, head_dim, max_position_embeddings, length)
    angles = position_ids[..., None].astype(working) * jnp.asarray(frequencies, working)[None, None]
    return (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)


def rotate(
    x: Float[Array, "batch seq heads dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads dim"]:
    """Rotate the pairs (x[i], x[i + dim/2]) of each head: the half-split layout of transformers."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _llama3(plain: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * np.pi / plain
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelength > context / low, plain / factor, plain)
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(medium, blended, scaled)


def _yarn(
    plain: np.ndarray, rope: Mapping[str, Any], dim: int, max_position_embeddings: int
) -> tuple[np.ndarray, float]:
    context = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_position_embeddings / context
    beta_fast, beta_slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1

    def correction_dim(rotations: int | float) -> float:
        turns = math.log(context / (rotations * 2 * math.pi))
        return dim * turns / (2 * math.log(rope["rope_theta"]))

    low, high = correction_dim(beta_fast), correction_dim(beta_slow)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # transformers' guard against a division by zero
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    frequencies = plain / factor * ramp + plain * (1 - ramp)

    def mscale(weight: Any) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        weight, weight_all = rope.get("mscale"), rope.get("mscale_all_dim")
        has_both = weight and weight_all
        attention_factor = mscale(weight) / mscale(weight_all) if has_both else mscale(1.0)
    return frequencies, float(attention_factor)


def longrope_attention_factor(rope: Mapping[str, Any], max_position_embeddings: int) -> float:
    """The factor on cos and sin of `longrope`; default: sqrt(1 + log(factor) / log(context))."""
    attention_factor = rope.get("attention_factor")
    if attention_factor is not None:
        return float(attention_factor)
    context = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_position_embeddings / context
    return math.sqrt(1 + (0.0 if factor <= 1 else math.log(factor) / math.log(context)))


def _longrope(
    plain: np.ndarray,
    rope: Mapping[str, Any],
    max_position_embeddings: int,
    length: int | Int[Array, ""],
) -> tuple[Any, float]:
    context = rope["original_max_position_embeddings"]
    attention_factor = longrope_attention_factor(rope, max_position_embeddings)
    short = plain / np.asarray(rope["short_factor"], np.float64)
    long = plain / np.asarray(rope["long_factor"], np.float64)
    if isinstance(length, int):
        return (long if length > context else short), attention_factor
    working = jnp.result_type(float)  # float64 exactly when x64 is on
    frequencies = jnp.where(
        length > context, jnp.asarray(long, working), jnp.asarray(short, working)
    )
    return frequencies, attention_factor


def _dynamic(
    plain: np.ndarray,
    factor: float,
    dim: int,
    max_position_embeddings: int,
    length: int | Int[Array, ""],
) -> Any:
    # theta' = theta * s^(dim / (dim - 2)), hence theta'^(-2i/dim) = theta^(-2i/dim) * s^(-2i/(dim-2)):
    # the constant part stays in float64 and only the small correction is traced.
    exponents = np.arange(0, dim, 2, dtype=np.float64) / (dim - 2)
    if isinstance(length, int):
        stretch = factor * max(length, max_position_embeddings) / max_position_embeddings
        return plain * (stretch - (factor - 1)) ** -exponents
    working = jnp.result_type(float)
    beyond = jnp.maximum(length - max_position_embeddings, 0).astype(working)
    # s = m 2^k with 1 <= m < 2: the powers of 2^k are computed in float64, for every k; those of m are
    # near 1, so the rounding of its logarithm is not amplified.
    mantissa, power = jnp.frexp(1 + factor * beyond / max_position_embeddings)
    powers_of_two = plain * 2.0 ** (-exponents * np.arange(64)[:, None])
    correction = jnp.exp(-jnp.asarray(exponents, working) * jnp.log(2 * mantissa))
    return jnp.asarray(powers_of_two, working)[power - 1] * correction


def _require_factors(name: str, value: Any, count: int) -> None:
    if not isinstance(value, list | tuple) or not all(_is_positive(factor) for factor in value):
        raise ValueError(f"rope_parameters[{name!r}]: found {value!r}, expected positive numbers")
    if len(value) != count:
        raise ValueError(
            f"rope_parameters[{name!r}]: found {len(value)} factors, expected head_dim / 2 = {count}"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300
