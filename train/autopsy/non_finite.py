"""Where numbers first are not finite: in the state, or in which part of a step."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from llama_jax.models.layers import DecoderLayer
from llama_jax.numerics.matmul import working_dtype
from train.autopsy.parts import part_in_words, part_name
from train.autopsy.replay import Replay, State, placed
from train.checkpoints import all_finite
from train.data.batch import Batch
from train.data.windows import Window
from train.program.activation_statistics import layer_inputs
from train.program.per_layer import is_stacked
from train.program.statistics import Norms
from train.program.step import batch_loss

_SHOWN = 5  # rows of a matrix


class Part(NamedTuple):
    """Of the state: a parameter or a moment, and the layer where layers are stacked.

    wrong: numbers that are not finite. rows: of a matrix, those that have them.
    """

    name: str
    layer: int | None
    wrong: int
    size: int
    rows: list[int]


class Broken(NamedTuple):
    """A state that is not finite, after `done` steps.

    saved: it is that of a checkpoint, or the one that the run began with.
    """

    done: int
    saved: bool
    parts: list[Part]


class Place(NamedTuple):
    """A place in the forward pass, in the order of computation.

    tokens: those with a number there that is not finite. largest: magnitude of those that are finite.
    """

    name: str
    tokens: Bool[np.ndarray, "rows seq"]
    largest: float


def broken_state(done: int, state: State, *, saved: bool) -> Broken | None:
    """What is not finite in a state after `done` steps; None if all is."""
    if all_finite(state):
        return None
    parts = []
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    for path, leaf in flat:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        wrong = ~np.isfinite(np.asarray(jax.device_get(leaf), np.float64))
        stacked = is_stacked(path) and leaf.ndim > 0
        for layer, part in enumerate(wrong if stacked else [wrong]):
            if part.any():
                rows = np.flatnonzero(part.any(1)).tolist() if part.ndim == 2 else []
                number = layer if stacked else None
                parts.append(Part(part_name(path), number, int(part.sum()), part.size, rows))
    return Broken(done, saved, parts)


def parts_in_words(parts: Sequence[Part]) -> Iterator[str]:
    """One line for each part."""
    for part in parts:
        shown = ", ".join(map(str, part.rows[:_SHOWN]))
        more = ", ..." if len(part.rows) > _SHOWN else ""
        rows = f", in row {shown}{more}" if part.rows and part.wrong < part.size else ""
        yield f"{part_in_words(part.name, part.layer)}: {part.wrong:,} of {part.size:,} numbers{rows}"


def forward_places(replay: Replay, params: Any, windows: Window) -> list[Place]:
    """The forward pass on a batch, in the run's own dtype, place by place."""
    tokens, largest = jax.device_get(jax.jit(_forward(replay))(params, placed(replay, windows)))
    layers = range(replay.config.num_hidden_layers)
    halves = [f"{half} of layer {layer}" for layer in layers for half in ("attention", "MLP")]
    names = ["the embedding", *halves, "the final norm", "the loss"]
    order = replay.program.batch.order
    if order is not None:
        tokens = tokens[..., np.argsort(order.slots(tokens.shape[-1]))]
    return [Place(*values) for values in zip(names, tokens, map(float, largest), strict=True)]


def _forward(replay: Replay) -> Callable[[Any, Batch], tuple[Array, Array]]:
    """`(params, batch)` -> of each place which tokens are not finite, and the largest number."""
    graphdef, model = replay.program.graphdef, replay.options.model
    dtype = jnp.dtype(model.compute_dtype or model.parameter_dtype)

    def seen(x: Array) -> tuple[Bool[Array, "rows seq"], Float[Array, ""]]:
        finite = jnp.isfinite(x)
        wide = jnp.abs(jnp.where(finite, x, 0)).astype(working_dtype(x.dtype))
        return ~finite.reshape(*x.shape[:2], -1).all(-1), jnp.max(wide)

    def run(params: Any, part: Batch) -> Any:
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        decoder = nnx.merge(graphdef, cast).model
        x, call = layer_inputs(decoder, part, model.attention)

        def layer(x: Array, layer: DecoderLayer) -> Any:
            middle = layer.attend(x, call).hidden
            out = layer.feed_forward(middle, call)
            return out, jax.tree.map(lambda *two: jnp.stack(two), seen(middle), seen(out))

        last, halves = jax.lax.scan(layer, x, decoder.layers)
        losses = batch_loss(
            graphdef,
            params,
            part,
            dtype,
            replay.options.optimizer.z_loss,
            None,
            reduction="none",
            attention_implementation=model.attention,
        ).loss
        halves = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), halves)
        rest = [seen(x), seen(decoder.norm(last)), seen(losses)]
        return jax.tree.map(
            lambda first, between, *ends: jnp.concatenate([first[None], between, jnp.stack(ends)]),
            rest[0],
            halves,
            *rest[1:],
        )

    def run_all(params: Any, batch: Batch) -> tuple[Array, Array]:
        tokens, largest = jax.lax.map(lambda part: run(params, part), batch)
        micro, places, rows, seq = tokens.shape
        return tokens.swapaxes(0, 1).reshape(places, micro * rows, seq), jnp.max(largest, axis=0)

    return run_all


def backward_place(norms: dict[str, Norms]) -> str | None:
    """The parameter whose gradient is not finite first, backwards from the loss; None if all are."""
    places = [
        (-1 if layer is None else layer, part_in_words(name, layer))
        for name, values in norms.items()
        for layer, value in (
            enumerate(values.gradient) if values.gradient.ndim else [(None, values.gradient)]
        )
        if not math.isfinite(value)
    ]

    # the embedding is last; the final norm and the head are first, before all layers
    def depth(place: tuple[int, str]) -> float:
        if place[0] >= 0:
            return place[0]
        return -1 if "embed_tokens" in place[1] else math.inf

    return max(places, key=depth)[1] if places else None
