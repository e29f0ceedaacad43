"""Faults in the independent Llama in JAX, written without the catalogue."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from parity_tests.harness import independent_llama as llama
from parity_tests.harness.cases import BY_NAME, weights_of
from parity_tests.traces.record_jax import record_jax

CASE = BY_NAME["gqa_3_to_1"]
Config = dict[str, Any]
CONFIGS: dict[str, Config] = {
    "base": CASE.config,
    "tied": CASE.config | {"tie_word_embeddings": True},
    "pairs of heads": BY_NAME["gqa_2_to_1"].config,
}
_RIGHT = {
    name: getattr(llama, name)
    for name in (
        *("norm", "angles", "rotate", "mask", "mix", "gated", "add", "embed"),
        *("project", "unembed", "cross_entropy"),
    )
}


class Plant(NamedTuple):
    """A fault in a program.

    Attributes:
        fault: its name in the catalogue.
        begins: the first array that departs.
        functions: of the program, by name -> what replaces them.
        config, weights: changes of them before the program is built.
        inputs: the names of what the program is called with, besides ids: labels (some are -100), positions
            and segments (two documents in each row).
        call: changes these before the program is called.
        of: the config of the checkpoint, in `CONFIGS`.
        direction: of the first departure.
    """

    fault: str
    begins: str
    functions: Mapping[str, Callable[..., Any]] = {}
    config: Mapping[str, Any] = {}
    weights: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda weights: weights
    inputs: tuple[str, ...] = ()
    call: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs
    of: str = "base"
    direction: str = "forward"


def inputs_of(names: tuple[str, ...], seed: int = 0, length: int = 24) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CASE.config["vocab_size"], (2, length))
    labels = np.where(rng.random(ids.shape) < [[0.1], [0.6]], -100, ids)
    segments = np.repeat(np.arange(2)[None], 2, axis=0).repeat(length // 2, axis=1)
    positions = np.tile(np.arange(length // 2), (2, 2))
    every = {"labels": labels, "segments": segments, "positions": positions}
    return {"ids": ids} | {name: every[name] for name in names}


_TRACE = {
    "ids": "input_ids",
    "labels": "labels",
    "positions": "position_ids",
    "segments": "segment_ids",
}


@contextlib.contextmanager
def planted(plants: tuple[Plant, ...]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for plant in plants:
            for name, wrong in plant.functions.items():
                stack.enter_context(mock.patch.object(llama, name, wrong))
        yield


def record_plants(out: Path, *plants: Plant, seed: int = 0, **options: Any) -> Path:
    """A recording with these faults. The weights' digests are those of the checkpoint."""
    config = dict(CONFIGS[plants[0].of])
    tensors = {name: w.numpy() for name, w in weights_of(config).items()}
    right = {name: value.copy() for name, value in tensors.items()}
    names: tuple[str, ...] = ()
    for plant in plants:
        config |= plant.config
        tensors = plant.weights(tensors)
        names += tuple(name for name in plant.inputs if name not in names)
    inputs = inputs_of(names, seed)
    arrays: dict[str, Any] = {name: jnp.asarray(a, jnp.int32) for name, a in inputs.items()}
    call = arrays
    for plant in plants:
        call = plant.call(call)
    params = llama.params_of(config, tensors, jnp.float32)
    original = llama.params_of(config, right, jnp.float32)

    def weights(of: Any) -> Any:
        return llama.to_hugging_face(config, original if of is params else of)

    with planted(plants):
        return record_jax(
            lambda params: llama.loss(config, params, **call),
            params,
            out,
            inputs={_TRACE[name]: array for name, array in arrays.items()},
            names=llama.names(config),
            weights=weights,
            quiet=True,
            **options,
        )


def bf16(x: Array) -> Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def rounded_matmul(to: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Of rounded operands, as hardware does it."""

    @jax.custom_vjp
    def matmul(x: Array, w: Array) -> Array:
        return to(x) @ to(w)

    def backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        x, w = map(to, operands)
        return to(g) @ w.T, jnp.einsum("bti,bto->io", x, to(g))

    matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), backward)
    return matmul


def _norm(f: Callable[[Array, Array, float], Array]) -> dict[str, Any]:
    return {"norm": f}


def _unit(x: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _mix(
    scale: float | None = None,
    cap: float = 0.0,
    heads: Callable[[Array, int], Array] = lambda x, times: jnp.repeat(x, times, axis=2),
    softmax: Callable[[Array], Array] = lambda s: jax.nn.softmax(s, axis=-1),
    scores: Callable[[Array], Array] = lambda s: s,
) -> dict[str, Any]:
    def mix(q: Array, k: Array, v: Array, seen: Array) -> Array:
        k, v = (heads(x, q.shape[2] // k.shape[2]) for x in (k, v))
        s = scores(jnp.einsum("btnd,bsnd->bnts", q, k) * (scale or q.shape[-1] ** -0.5))
        s = jnp.tanh(s / cap) * cap if cap else s
        return jnp.einsum("bnts,bsnd->btnd", softmax(jnp.where(seen[:, None], s, -1e30)), v)

    return {"mix": mix}


def _seen(f: Callable[[int], Array]) -> dict[str, Any]:
    return {"mask": lambda length, segments: f(length)[None]}


def _before(f: str, change: Callable[..., tuple[Any, ...]]) -> dict[str, Any]:
    """The program's function of changed arguments."""
    return {f: lambda *args: _RIGHT[f](*change(*args))}


def _after(f: str, change: Callable[[Array], Array]) -> dict[str, Any]:
    return {f: lambda *args: change(_RIGHT[f](*args))}


def _ce(reduce: Callable[[Array, Array, Array], Array], shift: int = 1) -> dict[str, Any]:
    """reduce(negative log-likelihoods, whether they count, logits)."""

    def loss(logits: Array, labels: Array) -> Array:
        n = logits.shape[1] - shift
        kept, targets = logits[:, :n], labels[:, shift:]
        log_p = jax.nn.log_softmax(kept)
        nll = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return reduce(nll, (targets != -100).astype(jnp.float32), kept)

    return {"cross_entropy": loss}


def _mean(nll: Array, counts: Array) -> Array:
    return jnp.sum(nll * counts) / jnp.sum(counts)


def _weights(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    def change(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = dict(weights)
        for module, function in changes.items():
            for name in weights:
                if f".{module}.weight" in name or name == f"{module}.weight":
                    result[name] = np.ascontiguousarray(function(weights[name]))
        return result

    return change


def _swap(one: str, other: str) -> Callable[[Any], Any]:
    def change(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = dict(weights)
        for name in weights:
            if f".{one}." in name:
                result[name] = weights[name.replace(one, other)]
            if f".{other}." in name:
                result[name] = weights[name.replace(other, one)]
        return result

    return change


def _meta(w: np.ndarray) -> np.ndarray:
    heads = w.reshape(-1, 8, w.shape[1])
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    return heads[:, order].reshape(w.shape)


def _interleaved(x: Array, turned_by: Array) -> Array:
    cos, sin = jnp.cos(turned_by)[:, :, None], jnp.sin(turned_by)[:, :, None]
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def _conjugate(x: Array, turned_by: Array) -> Array:
    return _RIGHT["rotate"](x, -turned_by)


def _half_rotated(x: Array, turned_by: Array) -> Array:
    quarter = turned_by[..., : x.shape[-1] // 4]
    first = _RIGHT["rotate"](x[..., : x.shape[-1] // 2], quarter)
    return jnp.concatenate([first, x[..., x.shape[-1] // 2 :]], axis=-1)


def _rotate_bf16(x: Array, turned_by: Array) -> Array:
    cos, sin = bf16(jnp.cos(turned_by))[:, :, None], bf16(jnp.sin(turned_by))[:, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


LAYER = "layers.0"
NORM1, ROTATED, ATTENTION = (
    f"{LAYER}.input_layernorm",
    f"{LAYER}.self_attn.rotate.q",
    f"{LAYER}.self_attn.attention",
)
ACT, MIDDLE, Q = f"{LAYER}.mlp.act", f"{LAYER}.after_attention", f"{LAYER}.self_attn.q_proj"


def f16(x: Array) -> Array:
    return x.astype(jnp.float16).astype(jnp.float32)


def _angles_of(powers: Callable[[int], Array]) -> dict[str, Any]:
    """Frequencies are these powers of theta."""

    def angles(positions: Array, dim: int, theta: float) -> Array:
        frequencies = jnp.float32(theta) ** -powers(dim)
        return positions.astype(jnp.float32)[..., None] * frequencies[None, None]

    return {"angles": angles}


def _by_heads(x: Array, turned_by: Array) -> Array:
    """The axes of positions and heads are exchanged, that of the angles are not."""
    turned = _RIGHT["rotate"](x.swapaxes(1, 2), turned_by[:, : x.shape[2]])
    return turned.swapaxes(1, 2)


def _plus(x: Array, turned_by: Array) -> Array:
    cos, sin = jnp.cos(turned_by)[:, :, None], jnp.sin(turned_by)[:, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos + b * sin, b * cos + a * sin], axis=-1)


def _put_in_halves(x: Array, turned_by: Array) -> Array:
    turned = _interleaved(x, turned_by)
    return jnp.concatenate([turned[..., ::2], turned[..., 1::2]], axis=-1)


def _all_at_once(x: Array, _: Array) -> Array:
    """All heads are one."""
    width = x.shape[2] * x.shape[3]
    turned_by = _RIGHT["angles"](jnp.arange(x.shape[1])[None], width, 10000.0)
    return _RIGHT["rotate"](x.reshape(*x.shape[:2], 1, width), turned_by).reshape(x.shape)


def _mix_with(
    of_scores: Callable[[Array, Array], Array],
    of_shares: Callable[[Array, Array], Array] = lambda p, seen: p,
    values: Callable[[Array, Array], Array] = lambda k, v: v,
) -> dict[str, Any]:
    """Other scores and probabilities, of them and of what is seen; other values."""

    def mix(q: Array, k: Array, v: Array, seen: Array) -> Array:
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, values(k, v)))
        scores = jnp.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
        scores = of_scores(scores, jnp.broadcast_to(seen[:, None], scores.shape))
        shares = of_shares(jax.nn.softmax(scores, axis=-1), seen[:, None])
        return jnp.einsum("bnts,bsnd->btnd", shares, v)

    return {"mix": mix}


def _results_by_group(q: Array, k: Array, v: Array, seen: Array) -> Array:
    mixed = _RIGHT["mix"](q, k, v, seen)
    groups = mixed.reshape(*mixed.shape[:2], k.shape[2], -1, mixed.shape[3])
    return groups.swapaxes(2, 3).reshape(mixed.shape)


def _fused(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Packed by key/value heads, as Megatron does it, and read as if the three were side by side."""
    result = dict(weights)
    for name in weights:
        if ".q_proj." in name:
            names = [name.replace("q_proj", f"{p}_proj") for p in "qkv"]
            three = [weights[n] for n in names]
            groups = [w.reshape(2, -1, w.shape[1]) for w in three]
            fused = np.concatenate(groups, axis=1).reshape(-1, three[0].shape[1])
            ends = np.cumsum([len(w) for w in three])[:-1]
            result |= dict(zip(names, np.split(fused, ends), strict=True))
    return result


def _gate_up_by_rows(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = dict(weights)
    for name in weights:
        if ".gate_proj." in name:
            up = name.replace("gate", "up")
            rows = np.stack([weights[name], weights[up]], axis=1)
            result[name], result[up] = np.split(rows.reshape(-1, rows.shape[-1]), 2)
    return result


def _layers_exchanged(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    result = dict(weights)
    for name in weights:
        for one in other:
            if one in name:
                result[name] = weights[name.replace(one, other[one])]
    return result


def _in_8_bits(w: np.ndarray) -> np.ndarray:
    scale = np.abs(w).max(axis=1, keepdims=True) / 127
    return (np.round(w / scale) * scale).astype(np.float32)


def _k_for_all_heads(w: np.ndarray) -> np.ndarray:
    """llama.cpp's permutation of k with the number of query heads."""
    return w.reshape(4, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MORE: dict[str, Plant] = {
    "exponents i / D": Plant(
        "rope_exponents", ROTATED, _angles_of(lambda dim: jnp.arange(dim // 2) / dim)
    ),
    "exponents to 1": Plant(
        "rope_exponents", ROTATED, _angles_of(lambda dim: jnp.linspace(0.0, 1.0, dim // 2))
    ),
    "positions over rows": Plant(
        "positions_over_rows",
        ROTATED,
        _before("angles", lambda p, *a: (p + jnp.array([[0], [24]]), *a)),
    ),
    "rotated by heads": Plant("positions_of_heads", ROTATED, {"rotate": _by_heads}),
    "no minus": Plant("rope_sign", ROTATED, {"rotate": _plus}),
    "neighbours put in halves": Plant("rope_neighbours", ROTATED, {"rotate": _put_in_halves}),
    "rotated before heads": Plant("rope_before_heads", ROTATED, {"rotate": _all_at_once}),
    "values rotated": Plant(
        "rope_of_values",
        ATTENTION,
        _before(
            "mix",
            lambda q, k, v, seen: (
                *(q, k),
                _RIGHT["rotate"](v, _RIGHT["angles"](jnp.arange(v.shape[1])[None], 8, 10000.0)),
                seen,
            ),
        ),
    ),
    "mean over positions too": Plant(
        "norm_axes",
        NORM1,
        _norm(
            lambda x, w, e: (
                x * jax.lax.rsqrt(jnp.mean(x * x, axis=(1, 2), keepdims=True) + e) * w[None, None]
            )
        ),
    ),
    "standard deviation": Plant(
        "norm_deviation",
        NORM1,
        _norm(
            lambda x, w, e: (
                x * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + e) * w[None, None]
            )
        ),
    ),
    "no root": Plant(
        "norm_deviation",
        NORM1,
        _norm(lambda x, w, e: x / (jnp.mean(x * x, axis=-1, keepdims=True) + e) * w[None, None]),
    ),
    "norm twice": Plant(
        "norm_twice", NORM1, _norm(lambda x, w, e: _RIGHT["norm"](_RIGHT["norm"](x, w, e), w, e))
    ),
    "norm float16": Plant("norm_float16", NORM1, _after("norm", f16)),
    "fused by groups": Plant("fused_layout", Q, weights=_fused),
    "k for all heads": Plant(
        "k_permuted_for_query_heads",
        f"{LAYER}.self_attn.k_proj",
        weights=_weights(k_proj=_k_for_all_heads),
        of="pairs of heads",
    ),
    "v in Meta's order": Plant(
        "no_qk_permutation", f"{LAYER}.self_attn.v_proj", weights=_weights(v_proj=_meta)
    ),
    "columns of o apart": Plant(
        "o_columns",
        f"{LAYER}.self_attn.o_proj",
        weights=_weights(o_proj=lambda w: w.reshape(48, 2, 3, 8).swapaxes(1, 2).reshape(48, 48)),
    ),
    "gate and up by rows": Plant(
        "gate_up_layout", f"{LAYER}.mlp.gate_proj", weights=_gate_up_by_rows
    ),
    "layers exchanged": Plant("layer_order", NORM1, weights=_layers_exchanged),
    "8 bits": Plant(
        "weights_rounded", Q, weights=_weights(**dict.fromkeys(PROJECTIONS, _in_8_bits))
    ),
    "results by group": Plant("heads_of_groups", ATTENTION, {"mix": _results_by_group}),
    "values are keys": Plant(
        "values_are_keys",
        ATTENTION,
        _mix_with(lambda s, seen: jnp.where(seen, s, -1e30), values=lambda k, v: k + 0 * v),
    ),
    "mask transposed": Plant(
        "mask_transposed", ATTENTION, _seen(lambda n: jnp.triu(jnp.ones((n, n), bool)))
    ),
    "mask multiplied": Plant(
        "mask_multiplied", ATTENTION, _mix_with(lambda s, seen: jnp.where(seen, s, 0.0))
    ),
    "mask after softmax": Plant(
        "mask_after_softmax",
        ATTENTION,
        _mix_with(lambda s, _: s, lambda p, seen: jnp.where(seen, p, 0.0)),
    ),
    "hidden at -5": Plant(
        "mask_value", ATTENTION, _mix_with(lambda s, seen: jnp.where(seen, s, -5.0))
    ),
    "chunks of 8": Plant(
        "attention_chunks",
        ATTENTION,
        _seen(
            lambda n: (
                jnp.tril(jnp.ones((n, n), bool))
                & (jnp.arange(n)[:, None] // 8 == jnp.arange(n)[None] // 8)
            )
        ),
    ),
    "softmax over heads": Plant(
        "softmax_over_queries",
        ATTENTION,
        _mix(softmax=lambda s: jax.nn.softmax(s, axis=1)),
    ),
    "softmax float16": Plant(
        "softmax_float16", ATTENTION, _mix(softmax=lambda s: f16(jax.nn.softmax(s, axis=-1)))
    ),
    "gate plus up": Plant("activation_sum", ACT, {"gated": lambda g, u: jax.nn.silu(g) + u}),
    "activation twice": Plant(
        "activation_twice", ACT, {"gated": lambda g, u: jax.nn.silu(jax.nn.silu(g)) * u}
    ),
    "matmul float8": Plant(
        "matmul_rounded",
        Q,
        {"project": rounded_matmul(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32))},
    ),
    "token 0 is zero": Plant(
        "embedding_zeros",
        "embed_tokens",
        {"embed": lambda table, ids: jnp.where((ids != 0)[..., None], table[ids], 0.0)},
    ),
    "token 1 ignored": Plant(
        "label_ignored",
        "loss",
        _before("cross_entropy", lambda x, y: (x, jnp.where(y == 1, -100, y))),
    ),
    "loss / 8": Plant("loss_scale", "loss", _after("cross_entropy", lambda loss: loss / 8)),
    "sum / 131": Plant("loss_count", "loss", _ce(lambda n, c, _: jnp.sum(n * c) / 131)),
    "softmax twice": Plant(
        "softmax_twice",
        "loss",
        _before("cross_entropy", lambda x, y: (jax.nn.softmax(x, axis=-1), y)),
    ),
    "labels across rows": Plant(
        "loss_shift",
        "loss",
        _before("cross_entropy", lambda x, y: (x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1))),
    ),
    "mean of halves": Plant(
        "mean_of_means",
        "loss",
        {
            "cross_entropy": lambda x, y: (
                (
                    _RIGHT["cross_entropy"](x[:, :13], y[:, :13])
                    + _RIGHT["cross_entropy"](x[:, 12:], y[:, 12:])
                )
                / 2
            )
        },
        inputs=("labels",),
    ),
}

PLANTS: dict[str, Plant] = _MORE | {
    "theta 500000": Plant("rope_theta", ROTATED, config={"rope_theta": 500000.0}),
    "theta 23456": Plant("rope_theta", ROTATED, config={"rope_theta": 23456.0}),
    "positions from 1": Plant(
        "position_off_by_one", ROTATED, _before("angles", lambda p, *a: (p + 1, *a))
    ),
    "positions not restarted": Plant(
        "positions_not_restarted",
        ROTATED,
        inputs=("positions",),
        call=lambda inputs: {n: a for n, a in inputs.items() if n != "positions"},
    ),
    "neighbours rotated": Plant("rope_neighbours", ROTATED, {"rotate": _interleaved}),
    "rotated backwards": Plant("rope_reversed", ROTATED, {"rotate": _conjugate}),
    "not rotated": Plant("rope_left_out", ROTATED, {"rotate": lambda x, _: x}),
    "rotated twice": Plant(
        "rope_twice", ROTATED, {"rotate": lambda x, a: _RIGHT["rotate"](_RIGHT["rotate"](x, a), a)}
    ),
    "half rotated": Plant("rope_partly", ROTATED, {"rotate": _half_rotated}),
    "cos and sin bf16": Plant("rope_bfloat16", ROTATED, {"rotate": _rotate_bf16}),
    "positions divided": Plant(
        "positions_divided",
        ROTATED,
        _before("angles", lambda p, *a: (p.astype(jnp.float32) / 4, *a)),
    ),
    "eps 1e-6": Plant("norm_eps", NORM1, config={"rms_norm_eps": 1e-6}),
    "eps 1e-12": Plant("norm_eps", NORM1, config={"rms_norm_eps": 1e-12}),
    "eps 0.003": Plant("norm_eps", NORM1, config={"rms_norm_eps": 0.003}),
    "eps outside": Plant(
        "norm_eps_outside_root",
        NORM1,
        _norm(
            lambda x, w, e: (
                x / (jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True)) + e) * w[None, None]
            )
        ),
    ),
    "1 + weight": Plant(
        "norm_weight_plus_one", NORM1, _norm(lambda x, w, e: _unit(x, e) * (1 + w)[None, None])
    ),
    "no weight": Plant(
        "norm_weight_dropped", NORM1, _norm(lambda x, w, e: _unit(x, e) + 0 * w[None, None])
    ),
    "layer norm": Plant(
        "layer_norm",
        NORM1,
        _norm(lambda x, w, e: _unit(x - jnp.mean(x, axis=-1, keepdims=True), e) * w[None, None]),
    ),
    "sum of squares": Plant(
        "norm_sum",
        NORM1,
        _norm(
            lambda x, w, e: (
                x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + e) * w[None, None]
            )
        ),
    ),
    "norm bf16": Plant("norm_bfloat16", NORM1, _after("norm", bf16)),
    "norm bf16 before weight": Plant(
        "norm_bfloat16", NORM1, _norm(lambda x, w, e: bf16(_unit(x, e)) * w[None, None])
    ),
    "norms swapped": Plant(
        "norms_swapped", NORM1, weights=_swap("input_layernorm", "post_attention_layernorm")
    ),
    "Meta's rows": Plant("no_qk_permutation", Q, weights=_weights(q_proj=_meta, k_proj=_meta)),
    "Meta's rows of q": Plant("no_qk_permutation", Q, weights=_weights(q_proj=_meta)),
    "heads apart": Plant(
        "head_order",
        Q,
        weights=_weights(q_proj=lambda w: w.reshape(2, 3, 8, 48).swapaxes(0, 1).reshape(48, 48)),
    ),
    "k and v swapped": Plant(
        "kv_swapped", f"{LAYER}.self_attn.k_proj", weights=_swap("k_proj", "v_proj")
    ),
    "q transposed": Plant("transposed", Q, weights=_weights(q_proj=lambda w: w.T)),
    "o transposed": Plant(
        "transposed", f"{LAYER}.self_attn.o_proj", weights=_weights(o_proj=lambda w: w.T)
    ),
    "gate and up swapped": Plant(
        "gate_up_swapped", f"{LAYER}.mlp.gate_proj", weights=_swap("gate_proj", "up_proj")
    ),
    "kv tiled": Plant(
        "kv_heads_tiled", ATTENTION, _mix(heads=lambda x, times: jnp.tile(x, (1, 1, times, 1)))
    ),
    "kv first": Plant(
        "kv_head_first",
        ATTENTION,
        _mix(heads=lambda x, times: jnp.repeat(x[:, :, :1], x.shape[2] * times, axis=2)),
    ),
    "scaled twice": Plant("scale_twice", ATTENTION, _mix(scale=1 / 8)),
    "not scaled": Plant("scale_none", ATTENTION, _mix(scale=1.0)),
    "scaled by hidden": Plant("attention_scale", ATTENTION, _mix(scale=48**-0.5)),
    "scaled by 0.3": Plant("attention_scale", ATTENTION, _mix(scale=0.3)),
    "sees the next": Plant(
        "mask_off_by_one", ATTENTION, _seen(lambda n: jnp.tril(jnp.ones((n, n), bool), 1))
    ),
    "sees all": Plant("mask_left_out", ATTENTION, _seen(lambda n: jnp.ones((n, n), bool))),
    "sees 8": Plant(
        "sliding_window",
        ATTENTION,
        _seen(lambda n: jnp.tril(jnp.ones((n, n), bool)) & ~jnp.tril(jnp.ones((n, n), bool), -8)),
    ),
    "documents leak": Plant(
        "documents_leak",
        ATTENTION,
        {"mask": lambda n, _: _RIGHT["mask"](n, None)},
        inputs=("segments",),
    ),
    "scores capped": Plant("attention_softcap", ATTENTION, _mix(cap=2.5)),
    "scores capped at 30": Plant("attention_softcap", ATTENTION, _mix(cap=30.0)),
    "softmax plus one": Plant(
        "softmax_plus_one",
        ATTENTION,
        _mix(softmax=lambda s: jnp.exp(s) / (1 + jnp.sum(jnp.exp(s), axis=-1, keepdims=True))),
    ),
    "softmax bf16": Plant(
        "softmax_bfloat16",
        ATTENTION,
        _mix(softmax=lambda s: bf16(jax.nn.softmax(s, axis=-1))),
    ),
    "scores bf16": Plant("softmax_bfloat16", ATTENTION, _mix(scores=bf16)),
    "gelu": Plant("activation", ACT, {"gated": lambda g, u: _gelu(g) * u}),
    "gelu tanh": Plant("activation", ACT, {"gated": lambda g, u: jax.nn.gelu(g) * u}),
    "relu": Plant("activation", ACT, {"gated": lambda g, u: jax.nn.relu(g) * u}),
    "quick gelu": Plant(
        "activation", ACT, {"gated": lambda g, u: g * jax.nn.sigmoid(1.702 * g) * u}
    ),
    "activation of up": Plant("activation_of_up", ACT, {"gated": lambda g, u: g * jax.nn.silu(u)}),
    "no gate": Plant("gate_left_out", ACT, {"gated": lambda g, u: jax.nn.silu(u) + 0 * g}),
    "clamped": Plant(
        "activation_clamped",
        ACT,
        {"gated": lambda g, u: jax.nn.silu(jnp.minimum(g, 1.0)) * jnp.clip(u, -1.0, 1.0)},
    ),
    "product bf16": Plant("activation_bfloat16", ACT, _after("gated", bf16)),
    "residual bf16": Plant("residual_bfloat16", MIDDLE, _after("add", bf16)),
    "residual times 0.22": Plant(
        "residual_multiplier", MIDDLE, _before("add", lambda x, y: (x, 0.22 * y))
    ),
    "residual times 0.7": Plant(
        "residual_multiplier", MIDDLE, _before("add", lambda x, y: (x, 0.7 * y))
    ),
    "residual left out": Plant("residual_dropped", MIDDLE, {"add": lambda x, y: y + 0 * x}),
    "matmul tf32": Plant(
        "matmul_rounded",
        Q,
        {"project": rounded_matmul(lambda x: jax.lax.reduce_precision(x, 8, 10))},
    ),
    "matmul bf16": Plant("matmul_rounded", Q, {"project": rounded_matmul(bf16)}),
    "embedding scaled": Plant(
        "embedding_scale", "embed_tokens", _after("embed", lambda x: x * 48**0.5)
    ),
    "embedding times 3": Plant("embedding_scale", "embed_tokens", _after("embed", lambda x: x * 3)),
    "ids off by one": Plant(
        "token_ids", "embed_tokens", _before("embed", lambda t, i: (t, jnp.maximum(i - 1, 0)))
    ),
    "head tied": Plant(
        "head_tied", "lm_head", {"unembed": lambda params, x: x @ params["table"].T}
    ),
    "logits scaled": Plant("logits_scale", "lm_head", _after("unembed", lambda x: x / 16)),
    "logits times 0.3": Plant("logits_scale", "lm_head", _after("unembed", lambda x: 0.3 * x)),
    "logits capped": Plant(
        "logits_softcap", "lm_head", _after("unembed", lambda x: 30 * jnp.tanh(x / 30))
    ),
    "no shift": Plant("loss_without_shift", "loss", _ce(lambda n, c, _: _mean(n, c), 0)),
    "shifted twice": Plant("loss_shift", "loss", _ce(lambda n, c, _: _mean(n, c), 2)),
    "mean over all": Plant(
        "mean_over_all_tokens",
        "loss",
        _ce(lambda n, c, _: jnp.sum(n * c) / c.size),
        inputs=("labels",),
    ),
    "sum": Plant("mean_over_all_tokens", "loss", _ce(lambda n, c, _: jnp.sum(n * c))),
    "mean of means": Plant(
        "mean_of_means",
        "loss",
        _ce(lambda n, c, _: jnp.mean(jnp.sum(n * c, axis=1) / jnp.sum(c, axis=1))),
        inputs=("labels",),
    ),
    "ignored counted": Plant(
        "ignored_counted", "loss", _ce(lambda n, c, _: jnp.mean(n)), inputs=("labels",)
    ),
    "z-loss": Plant(
        "z_loss",
        "loss",
        _ce(lambda n, c, x: _mean(n, c) + 1e-4 * _mean(jax.nn.logsumexp(x, axis=-1) ** 2, c)),
    ),
    "z-loss of 0.0037": Plant(
        "z_loss",
        "loss",
        _ce(lambda n, c, x: _mean(n, c) + 0.0037 * _mean(jax.nn.logsumexp(x, axis=-1) ** 2, c)),
    ),
    "labels smoothed": Plant(
        "label_smoothing",
        "loss",
        _ce(
            lambda n, c, x: (
                0.9 * _mean(n, c) - 0.1 * _mean(jnp.mean(jax.nn.log_softmax(x), axis=-1), c)
            )
        ),
    ),
    "vocabulary padded": Plant(
        "vocabulary_padded",
        "loss",
        _before("cross_entropy", lambda x, y: (jnp.pad(x, ((0, 0), (0, 0), (0, 3))), y)),
    ),
}
