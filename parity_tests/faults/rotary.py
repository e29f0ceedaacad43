"""Mistakes in rotary position embeddings."""

import math
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
    in_halves,
    of_number,
    one,
    rounded_to,
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
    rope, dim = oracle.rope_settings(fields), oracle.head_dim(fields)
    theta, factor = rope["rope_theta"], rope.get("factor") or 1.0
    known += [theta * factor, theta * factor ** (dim / (dim - 2)) if dim > 2 else theta]
    return [float(value) for value in known if value != theta]


def _exponents(fields: Config, _: Inputs) -> Variants:
    """Powers of theta from 0 to less than 1 in steps of 2 / D; others are those of another theta."""
    theta, dim = oracle.rope_settings(fields)["rope_theta"], oracle.head_dim(fields)
    size = fields["hidden_size"] // fields["num_attention_heads"]
    if size != dim:
        yield "are divided by hidden_size / heads", with_rope(rope_theta=theta ** (dim / size))
    yield "are half as large, i / D", with_rope(rope_theta=theta**0.5)
    yield "are twice as large, 4i / D", with_rope(rope_theta=theta**2)
    if dim > 2:
        yield "end in 1, 2i / (D - 2)", with_rope(rope_theta=theta ** (dim / (dim - 2)))
    yield "are divided by hidden_size", with_rope(rope_theta=theta ** (dim / fields["hidden_size"]))


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


def _theta_scaled(fields: Config, _: Inputs) -> Variants:
    """In place of a scaling."""
    rope, dim = oracle.rope_settings(fields), oracle.head_dim(fields)
    theta, factor = rope["rope_theta"], rope.get("factor") or 1.0
    if rope["rope_type"] != "default" and factor != 1:
        power = dim / (dim - 2) if dim > 2 else 1.0
        yield "", with_rope(rope_type="default", rope_theta=theta * factor)
        yield (
            " to the power of D / (D - 2)",
            with_rope(rope_type="default", rope_theta=theta * factor**power),
        )


def _long_and_short(fields: Config, _: Inputs) -> Variants:
    rope = oracle.rope_settings(fields)
    if rope["rope_type"] == "longrope":
        yield "", with_rope(long_factor=rope["short_factor"], short_factor=rope["long_factor"])


def _truncate(fields: Config, _: Inputs) -> Variants:
    rope = oracle.rope_settings(fields)
    if rope["rope_type"] == "yarn":
        truncate = not rope.get("truncate", True)
        yield str(truncate).lower(), with_rope(truncate=truncate)


def _without_scaling(config: Config) -> Config:
    rope = oracle.rope_settings(config)
    kept = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    rest = {name: value for name, value in config.items() if name != "rope_scaling"}
    return rest | {"rope_parameters": kept}


def _blended(share_of: Callable[[Tensor], Tensor]) -> Change:
    """Another share of the frequencies is not interpolated, as a function of the right one."""

    def replacement(right: Any) -> Any:
        def wrong(config: Config, *args: Any) -> Any:
            scaled, scale = right(config, *args)
            plain = right(_without_scaling(config), *args)[0]
            slow = plain / _factor(config)
            share = ((scaled - slow) / (plain - slow)).clamp(0.0, 1.0)
            share = torch.where(share < 1e-9, 0.0, torch.where(share > 1 - 1e-9, 1.0, share))
            share = share_of(share)
            return share * plain + (1 - share) * slow, scale

        return wrong

    return Change(functions={"inverse_frequencies": replacement}, angles=True)


def _factor(config: Config) -> float:
    rope = oracle.rope_settings(config)
    trained = rope["original_max_position_embeddings"]
    return rope.get("factor") or config["max_position_embeddings"] / trained


def _blends(fields: Config, _: Inputs) -> Variants:
    """Of types that leave fast pairs, interpolate slow ones, and blend between them."""
    if oracle.rope_settings(fields)["rope_type"] not in ("llama3", "yarn"):
        return
    yield "not blended: all between is left as it is", _blended(lambda s: (s > 0).to(s.dtype))
    yield "not blended: all between is interpolated", _blended(lambda s: (s == 1).to(s.dtype))
    yield (
        "blended the wrong way round",
        _blended(lambda s: torch.where((s > 0) & (s < 1), 1 - s, s)),
    )
    yield "exchanged: fast pairs are interpolated, slow ones are not", _blended(lambda s: 1 - s)


def _scaled_twice(fields: Config, _: Inputs) -> Variants:
    """The frequencies that scaling returns are scaled again."""

    def replacement(right: Any) -> Any:
        def wrong(config: Config, *args: Any) -> Any:
            scaled, scale = right(config, *args)
            rope = oracle.rope_settings(config)
            turns = rope["original_max_position_embeddings"] * scaled / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return share * scaled + (1 - share) * scaled / rope["factor"], scale

        return wrong

    def of_plain(right: Any) -> Any:
        def wrong(config: Config, *args: Any) -> Any:
            scaled, scale = right(config, *args)
            return scaled * scaled / right(_without_scaling(config), *args)[0], scale

        return wrong

    kind = oracle.rope_settings(fields)["rope_type"]
    if kind == "llama3":
        yield "", Change(functions={"inverse_frequencies": replacement}, angles=True)
    elif kind != "default":
        yield "", Change(functions={"inverse_frequencies": of_plain}, angles=True)


_PAIRS = (
    ("low_freq_factor", "high_freq_factor"),
    ("beta_fast", "beta_slow"),
    ("mscale", "mscale_all_dim"),
    ("factor", "original_max_position_embeddings"),
)


def _pairs_of_fields(fields: Config, _: Inputs) -> Variants:
    """Two fields exchanged, or both left out."""
    rope = oracle.rope_settings(fields)
    used = _USED.get(rope["rope_type"], ())
    for first, second in _PAIRS:
        if first in used and second in used and rope.get(first) and rope.get(second):
            exchanged = with_rope(**{first: rope[second], second: rope[first]})
            yield f"{first} and {second} are exchanged", exchanged
            if first in ("beta_fast", "mscale"):  # those that have a default
                yield f"{first} and {second} are left out", with_rope(**{first: None, second: None})


def _one_list(fields: Config, _: Inputs) -> Variants:
    rope = oracle.rope_settings(fields)
    if rope["rope_type"] == "longrope":
        yield "short_factor", with_rope(long_factor=rope["short_factor"])
        yield "long_factor", with_rope(short_factor=rope["long_factor"])


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
        count = np.cumsum(np.asarray(mask) != 0, axis=1)
        yield (
            "count the tokens that attention_mask shows",
            _moved(lambda *_: np.maximum(count - 1, 0)),
        )
        yield "count the tokens that attention_mask shows, from 1", _moved(lambda *_: count)
    if segments is not None:
        steps = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
        first = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
        start = np.maximum.accumulate(np.where(first, steps, 0), axis=1)
        yield "restart in every document", _moved(lambda *_: steps - start)


def _over_rows(_: Config, inputs: Inputs) -> Variants:
    if len(inputs.ids) > 1:
        steps = np.arange(inputs.ids.size).reshape(inputs.ids.shape)
        yield "", _moved(lambda *_: steps)


def _of_heads(_: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head is turned by the angles of the position that has its number."""
    heads = x.shape[1]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, :heads, None] + turned * sin[:, :heads, None]


def _with_values(rotation: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Change:
    """Values are rotated too."""
    kept: list[Any] = []

    def rotate(right: Any) -> Any:
        def same(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            kept[:] = [right, cos, sin]  # attention follows and has no angles
            return right(x, cos, sin)

        return same

    def attention(right: Any) -> Any:
        def wrong(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Any:
            rotate, *angles = kept
            cos, sin = (each[:, : v.shape[2]] for each in angles)
            return right(q, k, rotation(rotate, v, cos, sin), visible)

        return wrong

    return Change(functions={"rotate": rotate, "attention": attention})


def _before_heads(fields: Config, inputs: Inputs) -> Variants:
    """All features of a token are rotated as one head."""
    theta = oracle.rope_settings(fields)["rope_theta"]
    dim = oracle.head_dim(fields)

    def rotated(value: Tensor, x: Tensor, neighbours: bool) -> Tensor:
        width = x.shape[-1]
        powers = theta ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
        angles = torch.from_numpy(inputs.positions).to(x.dtype)[..., None] * powers
        cos, sin = angles.cos(), angles.sin()
        if not neighbours:
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).reshape(value.shape)
        x = _in_pairs(x.unflatten(-1, (-1, dim))).flatten(-2)
        a, b = x[..., 0::2], x[..., 1::2]
        x = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return _in_halves(x.unflatten(-1, (-1, dim))).reshape(value.shape)

    def change(neighbours: bool) -> Change:
        def step(name: str) -> Callable[[Steps, Tensor], Tensor]:
            return lambda steps, value: rotated(
                value, steps.read[f"self_attn.{name}_proj"], neighbours
            )

        return Change(steps={f"self_attn.rotate.{name}": step(name) for name in "qk"})

    yield "", change(neighbours=False)
    yield " (of rows in Meta's order)", change(neighbours=True)


def _in_pairs(x: Tensor) -> Tensor:
    """Features [..., D] from halves to pairs of neighbours."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _in_halves(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


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


def _angles_in(narrow: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Positions, frequencies, angles, cos and sin."""

    def wrong(config: Config, position_ids: Tensor, dtype: torch.dtype = torch.float64) -> Any:
        inv_freq, scale = oracle.inverse_frequencies(config, int(position_ids.max()) + 1, dtype)
        angles = narrow(narrow(position_ids[..., None].to(dtype)) * narrow(inv_freq))
        angles = torch.cat((angles, angles), dim=-1)
        return narrow(angles.cos() * scale), narrow(angles.sin() * scale)

    return lambda _: wrong


def _positions_in(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda right: (
        lambda config, positions, *args: right(config, positions.to(dtype).long(), *args)
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


def _neighbours_put_in_halves(right: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _in_halves(_neighbours(right, x, cos, sin))


def _halves_of_metas_order(right: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rows are in Meta's order, but the pairs (i, i + D/2) of it are turned."""
    return _in_halves(right(_in_pairs(x), cos, sin))


def _without_sign(_: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((second, first), dim=-1) * sin[:, None]


def _turned_alone(name: str, change: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Change:
    """Only the heads of `name`, "q" or "k", are turned otherwise: queries are turned first."""

    def replacement(right: Any) -> Any:
        calls = [0]

        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            calls[0] += 1
            wrong = (calls[0] % 2 == 1) == (name == "q")
            return change(right, x, cos, sin) if wrong else right(x, cos, sin)

        return rotate

    return Change(functions={"rotate": replacement})


def _previous(right: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return right(x, cos.roll(1, 1), sin.roll(1, 1))


def _backwards(right: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return right(x, cos, -sin)


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


def _rotary_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return several(
        f"rope_{half}",
        f"rotary embeddings are in {half} ({{}})",
        ANGLES,
        {
            "cos and sin": _angles(lambda cos, sin: (narrow(cos), narrow(sin))),
            "frequencies": _frequencies(narrow),
            "angles": Change(functions={"cos_sin": _angles_in(narrow)}, angles=True),
            "positions": Change(functions={"cos_sin": _positions_in(dtype)}, angles=True),
            "the rotation": _rotate(
                lambda right, *args: right(*(a.to(dtype) for a in args)).to(args[0].dtype)
            ),
            "what it returns": _rotate(lambda right, *args: narrow(right(*args))),
            "what it reads": _rotate(lambda right, x, *args: right(narrow(x), *args)),
        },
        rounds=True,
    )


FAULTS: list[Fault] = [
    of_number("rope_theta", "rope_theta is {}", ANGLES, _thetas, lambda v: with_rope(rope_theta=v)),
    Fault("rope_scaling_dropped", "the rotary scaling is left out", ANGLES, _scaling_dropped),
    Fault("rope_type", "the rotary type is {}", ANGLES, _other_type),
    *map(_field, _FIELDS),
    Fault("rope_exponents", "the exponents of rope_theta {}", ANGLES, _exponents),
    Fault("rope_blend", "rotary frequencies are {}", ANGLES, _blends),
    Fault("rope_scaling_twice", "the rotary scaling is applied twice", ANGLES, _scaled_twice),
    Fault("rope_pair_of_fields", "rotary fields {}", ANGLES, _pairs_of_fields),
    Fault("rope_truncate", "rotary field truncate is {}", ANGLES, _truncate),
    Fault(
        "rope_long_and_short",
        "long_factor and short_factor are swapped",
        ANGLES,
        _long_and_short,
    ),
    Fault("rope_one_list", "all lengths use the {} of longrope", ANGLES, _one_list),
    Fault(
        "rope_theta_scaled",
        "rope_theta is multiplied by the factor{}, in place of the scaling",
        ANGLES,
        _theta_scaled,
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
            "are two too large": _moved(lambda p, _: p + 2),
            "are rolled by one": _moved(lambda p, _: np.roll(p, 1, axis=1)),
            "of queries are rolled by one": _turned_alone("q", _previous),
            "of keys are rolled by one": _turned_alone("k", _previous),
        },
    ),
    Fault(
        "positions_over_rows",
        "positions count on from one row of the batch to the next",
        ANGLES,
        _over_rows,
    ),
    one(
        "positions_of_heads",
        "heads are rotated by their own number, not by the position (axes of heads and positions)",
        ROTATED,
        _rotate(_of_heads),
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
    several(
        "rope_neighbours",
        "rotary pairs are {}",
        ROTATED,
        {
            "neighbours (2i, 2i + 1), not half a head apart": _rotate(_neighbours),
            "neighbours (2i, 2i + 1), but their results are put half a head apart": _rotate(
                _neighbours_put_in_halves
            ),
            "half a head apart in rows that are in Meta's order": _rotate(_halves_of_metas_order),
        },
    ),
    one(
        "rope_sign",
        "the rotation lacks its minus sign",
        ROTATED,
        _rotate(_without_sign),
    ),
    several(
        "rope_of_values",
        "values are rotated too{}",
        ("self_attn.attention",),
        {
            "": _with_values(lambda right, *args: right(*args)),
            ", in pairs of neighbours": _with_values(_neighbours),
        },
    ),
    Fault(
        "rope_before_heads",
        "queries and keys are rotated before they are split into heads{}",
        ROTATED,
        _before_heads,
    ),
    one(
        "rope_angles_repeated",
        "angles are in the order of neighbouring pairs, features are not",
        ANGLES,
        _rotate(_repeated_angles),
    ),
    several(
        "rope_reversed",
        "rotary embeddings turn the other way{}",
        ANGLES,
        {
            "": _angles(lambda cos, sin: (cos, -sin)),
            ", of queries": _turned_alone("q", _backwards),
            ", of keys": _turned_alone("k", _backwards),
        },
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
    several(
        "positions_zero",
        "all positions are {}",
        ANGLES,
        {
            "0": _moved(lambda p, _: 0 * p),
            "the number of the row": _moved(lambda p, _: 0 * p + np.arange(len(p))[:, None]),
        },
    ),
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
    *in_halves(_rotary_in),
]
