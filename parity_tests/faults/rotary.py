"""Mistakes in rotary position embeddings."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_jax.presets import PRESETS
from parity_tests.faults.change import (
    Change,
    Config,
    Family,
    Fault,
    Steps,
    Variants,
    in_bfloat16,
    of_number,
    one,
    several,
)
from parity_tests.reference import oracle
from parity_tests.traces.sections import Inputs

ROTATED = ("self_attn.rotate.q", "self_attn.rotate.k")
ANGLES = ("rotary.cos", "rotary.sin", *ROTATED)

# of each field, what published checkpoints have
_FIELDS: Mapping[str, tuple[float, ...]] = {
    "factor": (2.0, 4.0, 8.0, 16.0, 32.0, 40.0),
    "low_freq_factor": (1.0, 2.0),
    "high_freq_factor": (1.0, 2.0, 4.0, 8.0),
    "original_max_position_embeddings": (2048.0, 4096.0, 8192.0, 16384.0, 32768.0),
    "beta_fast": (32.0, 16.0, 64.0),
    "beta_slow": (1.0, 2.0, 0.5),
    "attention_factor": (1.0,),
    "mscale": (0.707, 1.0),
    "mscale_all_dim": (0.707, 1.0),
    "partial_rotary_factor": (0.25, 0.5, 0.75, 1.0),
}
_USED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "proportional": ("factor", "partial_rotary_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor"),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}


def with_rope(**changes: Any) -> Change:
    """Other rotary fields; None drops one."""

    def fields(config: Config) -> Config:
        rope = oracle.rope_settings(config) | changes
        rope = {name: value for name, value in rope.items() if value is not None}
        without = ("rope_scaling", "original_max_position_embeddings")
        rest = {name: value for name, value in config.items() if name not in without}
        if "max_position_embeddings" in changes:
            rest["max_position_embeddings"] = changes["max_position_embeddings"]
        return rest | {"rope_parameters": rope}

    return Change(fields=fields, angles=True)


def _thetas(fields: Config) -> list[float]:
    known = [
        10000.0,
        500000.0,
        1000000.0,
        100000.0,
        *(p.rope["rope_theta"] for p in PRESETS.values()),
    ]
    return [float(theta) for theta in known if theta != oracle.rope_settings(fields)["rope_theta"]]


def _field(name: str) -> Fault:
    """A rotary field that is read wrong, or not at all."""

    def is_used(fields: Config) -> bool:
        return name in _USED.get(oracle.rope_settings(fields)["rope_type"], ())

    def variants(fields: Config, _: Inputs) -> Variants:
        if not is_used(fields):
            return
        rope = oracle.rope_settings(fields)
        if rope.get(name) is not None and name != "original_max_position_embeddings":
            yield "left out", with_rope(**{name: None})
        if name == "original_max_position_embeddings":
            yield "max_position_embeddings", with_rope(**{name: fields["max_position_embeddings"]})

    def family(fields: Config) -> Family:
        now = oracle.rope_settings(fields).get(name)
        values = [v for v in _FIELDS[name] if v != now] if is_used(fields) else []
        return Family(tuple(values), lambda value: with_rope(**{name: value}))

    return Fault(f"rope_{name}", f"rotary field {name} is {{}}", ANGLES, variants, family)


def _scaling_dropped(fields: Config, _: Inputs) -> Variants:
    if oracle.rope_settings(fields)["rope_type"] != "default":
        yield "", with_rope(rope_type="default")


def _other_type(fields: Config, _: Inputs) -> Variants:
    rope = oracle.rope_settings(fields)
    factor, kind = rope.get("factor") or 1.0, rope["rope_type"]
    if kind != "default" and factor != 1:
        for other in ("linear", "dynamic", "yarn"):
            if other != kind:
                yield other, with_rope(rope_type=other, factor=factor)
    for name, preset in PRESETS.items():
        settings = dict(preset.rope)
        if settings.get("rope_type", "default") not in (kind, "default"):
            yield f"that of {name}", with_rope(**settings)


def _long_and_short(fields: Config, _: Inputs) -> Variants:
    rope = oracle.rope_settings(fields)
    if rope["rope_type"] == "longrope":
        yield "", with_rope(long_factor=rope["short_factor"], short_factor=rope["long_factor"])


def _truncate(fields: Config, _: Inputs) -> Variants:
    rope = oracle.rope_settings(fields)
    if rope["rope_type"] == "yarn":
        truncate = not rope.get("truncate", True)
        yield str(truncate).lower(), with_rope(truncate=truncate)


def _moved(by: Callable[[np.ndarray, Inputs], np.ndarray]) -> Change:
    """Other positions."""

    def inputs(inputs: Inputs) -> Inputs:
        positions = np.broadcast_to(inputs.positions, inputs.ids.shape)
        return inputs._replace(position_ids=by(positions, inputs))

    return Change(inputs=inputs, angles=True)


def _from_zero(positions: np.ndarray, _: Inputs) -> np.ndarray:
    return np.broadcast_to(np.arange(positions.shape[1]), positions.shape)


def _not_restarted(_: Config, inputs: Inputs) -> Variants:
    if inputs.position_ids is not None:
        yield "", _moved(_from_zero)


def _restarted(_: Config, inputs: Inputs) -> Variants:
    mask, segments = inputs.attention_mask, inputs.segment_ids
    if mask is not None:
        yield (
            "count the tokens that attention_mask shows",
            _moved(lambda *_: np.maximum(np.cumsum(mask, axis=1) - 1, 0)),
        )
    if segments is not None:
        steps = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
        first = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
        start = np.maximum.accumulate(np.where(first, steps, 0), axis=1)
        yield "restart in every document", _moved(lambda *_: steps - start)


def _angles(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Change:
    def replacement(cos_sin: Any) -> Any:
        return lambda *args: change(*cos_sin(*args))

    return Change(functions={"cos_sin": replacement}, angles=True)


def _frequencies(change: Callable[[Tensor], Tensor]) -> Change:
    def replacement(right: Any) -> Any:
        def wrong(*args: Any) -> Any:
            inv_freq, scale = right(*args)
            return change(inv_freq), scale

        return wrong

    return Change(functions={"inverse_frequencies": replacement}, angles=True)


def _angles_in_bfloat16(_: Any) -> Any:
    def wrong(config: Config, position_ids: Tensor, dtype: torch.dtype = torch.float64) -> Any:
        inv_freq, scale = oracle.inverse_frequencies(config, int(position_ids.max()) + 1, dtype)
        angles = in_bfloat16(in_bfloat16(position_ids[..., None].to(dtype)) * in_bfloat16(inv_freq))
        angles = torch.cat((angles, angles), dim=-1)
        return in_bfloat16(angles.cos() * scale), in_bfloat16(angles.sin() * scale)

    return wrong


def _positions_in_bfloat16(right: Any) -> Any:
    return lambda config, positions, *args: right(
        config, positions.to(torch.bfloat16).long(), *args
    )


def _rotate(change: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Change:
    """Another rotation; called with the right one."""
    return Change(
        functions={"rotate": lambda right: lambda x, cos, sin: change(right, x, cos, sin)}
    )


def _neighbours(_: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (2i, 2i + 1) are turned, not (i, i + D/2)."""
    half = cos.shape[-1] // 2
    c, s = cos[:, None, :, :half], sin[:, None, :, :half]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)


def _repeated_angles(right: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin of neighbours are alike, but the pairs are half a head apart."""
    half = cos.shape[-1] // 2
    c, s = (t[..., :half].repeat_interleave(2, dim=-1) for t in (cos, sin))
    return right(x, c, s)


def _partly(share: float) -> Change:
    def change(right: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        count = int(x.shape[-1] * share) // 2 * 2
        half = count // 2
        c, s = (torch.cat((t[..., :half], t[..., :half]), dim=-1) for t in (cos, sin))
        return torch.cat((right(x[..., :count], c, s), x[..., count:]), dim=-1)

    return _rotate(change)


def _not_rotated(name: str) -> Change:
    """The heads of `name` are not rotated."""

    def step(steps: Steps, value: Tensor) -> Tensor:
        return steps.read[f"self_attn.{name}_proj"].reshape(value.shape)

    return Change(steps={f"self_attn.rotate.{name}": step})


FAULTS: list[Fault] = [
    of_number("rope_theta", "rope_theta is {}", ANGLES, _thetas, lambda v: with_rope(rope_theta=v)),
    Fault("rope_scaling_dropped", "the rotary scaling is left out", ANGLES, _scaling_dropped),
    Fault("rope_type", "the rotary type is {}", ANGLES, _other_type),
    *map(_field, _FIELDS),
    Fault("rope_truncate", "rotary field truncate is {}", ANGLES, _truncate),
    Fault(
        "rope_long_and_short",
        "long_factor and short_factor are swapped",
        ANGLES,
        _long_and_short,
    ),
    of_number(
        "positions_divided",
        "positions are divided by {}",
        ANGLES,
        lambda _: (2.0, 4.0, 8.0, 16.0, 32.0),
        lambda value: _frequencies(lambda inv_freq: inv_freq / value),
    ),
    several(
        "position_off_by_one",
        "positions {}",
        ANGLES,
        {
            "are one too large": _moved(lambda p, _: p + 1),
            "are one too large after the first": _moved(lambda p, _: p + (p > 0)),
            "are one too small": _moved(lambda p, _: p - 1),
            "are rolled by one": _moved(lambda p, _: np.roll(p, 1, axis=1)),
        },
    ),
    Fault(
        "positions_not_restarted",
        "position_ids are ignored: positions count from 0 in every row",
        ANGLES,
        _not_restarted,
    ),
    Fault(
        "positions_of_tokens",
        "positions do not count from 0 in every row: they {}",
        ANGLES,
        _restarted,
    ),
    one(
        "rope_neighbours",
        "rotary pairs are neighbours (2i, 2i + 1), not half a head apart",
        ROTATED,
        _rotate(_neighbours),
    ),
    one(
        "rope_angles_repeated",
        "angles are in the order of neighbouring pairs, features are not",
        ANGLES,
        _rotate(_repeated_angles),
    ),
    one(
        "rope_reversed",
        "rotary embeddings turn the other way",
        ANGLES,
        _angles(lambda cos, sin: (cos, -sin)),
    ),
    one(
        "rope_cos_sin_swapped",
        "cos and sin are swapped",
        ANGLES,
        _angles(lambda cos, sin: (sin, cos)),
    ),
    several(
        "rope_left_out",
        "{} not rotated",
        ROTATED,
        {
            "queries and keys are": _rotate(lambda _, x, cos, sin: x),
            "queries are": _not_rotated("q"),
            "keys are": _not_rotated("k"),
        },
    ),
    one("positions_zero", "all positions are 0", ANGLES, _moved(lambda p, _: 0 * p)),
    one(
        "rope_twice",
        "queries and keys are rotated twice",
        ROTATED,
        _rotate(lambda right, x, cos, sin: right(right(x, cos, sin), cos, sin)),
    ),
    several(
        "rope_partly",
        "only {} of each head is rotated",
        ROTATED,
        {"a quarter": _partly(0.25), "half": _partly(0.5), "three quarters": _partly(0.75)},
    ),
    several(
        "rope_bfloat16",
        "rotary embeddings are in bfloat16 ({})",
        ANGLES,
        {
            "cos and sin": _angles(lambda cos, sin: (in_bfloat16(cos), in_bfloat16(sin))),
            "frequencies": _frequencies(in_bfloat16),
            "angles": Change(functions={"cos_sin": _angles_in_bfloat16}, angles=True),
            "positions": Change(functions={"cos_sin": _positions_in_bfloat16}, angles=True),
            "the rotation": _rotate(
                lambda right, *args: right(*(a.to(torch.bfloat16) for a in args)).to(args[0].dtype)
            ),
            "what it returns": _rotate(lambda right, *args: in_bfloat16(right(*args))),
            "what it reads": _rotate(lambda right, x, *args: right(in_bfloat16(x), *args)),
        },
        rounds=True,
    ),
]
