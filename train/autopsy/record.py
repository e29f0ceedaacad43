"""One step with everything recorded, in float64 where there is memory for it."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from llama_jax.files.memory import available_memory
from llama_jax.loss import IGNORE_INDEX
from llama_jax.models.layers import DecoderLayer
from train.autopsy.documents import PieceLoss, only
from train.autopsy.replay import Replay, State, placed
from train.data.batch import Batch
from train.data.windows import Window
from train.program.activation_statistics import layer_inputs
from train.program.guard import group_names
from train.program.optimizer import decay_mask, global_norm
from train.program.per_layer import is_stacked
from train.program.statistics import Norms, parameter_norms
from train.program.step import batch_loss

# arrays of the parameters' size that are in memory at once: the state and the new one (six), the gradient,
# that of a document, the update and what XLA needs for them
_COPIES = 12
_SHARE = 0.5  # of the memory that is free


class Branches(NamedTuple):
    """Root mean squares, [layers]: a layer's input, and what its attention and its MLP add to it."""

    residual: Float[Array, " layers"]
    attention: Float[Array, " layers"]
    mlp: Float[Array, " layers"]


class Contribution(NamedTuple):
    """What one piece of a document has to do with the step's gradient, the mean over all labels.

    loss: per label, z-loss included.
    norm: of its part of the gradient; the parts of all pieces add up to the gradient.
    cosine: between its part and the sum of the others.
    norm_without: of the gradient of the batch without it.
    loss_without: of the batch without it, per label.
    by_layer: norm of its part, by group, see `group_names`.
    """

    loss: float
    norm: float
    cosine: float
    norm_without: float
    loss_without: float
    by_layer: np.ndarray


class Terms(NamedTuple):
    """What the update is made of: learning_rate x (direction + weight_decay x parameters).

    clip: the factor by which the gradient was scaled down; 1 without clipping.
    direction, decay: norms of both terms, times the learning rate. update: of their sum.
    """

    learning_rate: float
    clip: float
    direction: float
    decay: float
    update: float


class Recorded(NamedTuple):
    """The step. groups: names of what `by_layer` and the layers' tables have a value for."""

    dtype: str
    loss: float
    grad_norm: float
    num_tokens: int
    groups: list[str]
    norms: dict[str, Norms]
    branches: Branches
    contributions: list[Contribution]
    terms: Terms


def recording_dtype(replay: Replay) -> str:
    """float64, or float32 where 12 copies of the parameters in float64 exceed half of the free memory.

    The free memory is the host's on a CPU, otherwise the device's. TPUs have no float64 of their own, and
    record in float32.
    """
    device = replay.program.mesh.devices.flat[0]
    size = sum(leaf.size for leaf in jax.tree.leaves(replay.program.params))
    if device.platform == "tpu":
        return "float32"
    if device.platform == "cpu":
        free = available_memory()
    else:
        memory = device.memory_stats() or {}
        free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
        size = -(-size // replay.program.mesh.devices.size)
    needed = 8 * _COPIES * size
    return "float64" if free is not None and needed <= _SHARE * free else "float32"


def record_step(
    replay: Replay, step: int, state: State, windows: Window, pieces: list[PieceLoss], dtype: str
) -> Recorded:
    """Record a step; dropout, if the model has any, is off.

    Args:
        state: before the step, on the host.
        pieces: of the documents in `windows`, the step's batch.
    """
    with jax.enable_x64(True) if dtype == "float64" else nullcontext():
        return _record(replay, step, state, windows, pieces, jnp.dtype(dtype))


def _record(
    replay: Replay, step: int, state: State, windows: Window, pieces: list[PieceLoss], dtype: Any
) -> Recorded:
    program, options = replay.program, replay.options
    params, opt_state = (
        jax.tree.map(
            lambda leaf, like: jax.device_put(_cast(leaf, dtype), like.sharding), tree, abstract
        )
        for tree, abstract in zip(state, (program.params, program.opt_state), strict=True)
    )
    forward: dict[str, Any] = {"remat": options.model.remat_policy}
    z_loss = options.optimizer.z_loss

    @jax.jit
    def gradient(params: Any, part: Batch, count: Array) -> tuple[Array, Any]:
        def mean(params: Any) -> Array:
            out = batch_loss(program.graphdef, params, part, dtype, z_loss, None, **forward)
            return out.loss / count

        return jax.value_and_grad(mean)(params)

    def summed(windows: Window, rows: slice | None = None) -> tuple[float, Any]:
        total, gradients = 0.0, None
        for part in _parts(replay, windows, rows):
            loss, grads = gradient(params, part, count)
            total += float(loss)
            gradients = grads if gradients is None else jax.tree.map(jnp.add, gradients, grads)
        return total, gradients

    number = int((windows["labels"] != IGNORE_INDEX).sum())
    count = jnp.asarray(max(number, 1), dtype)
    loss, gradients = summed(windows)
    whole = np.asarray(_dots(gradients, gradients)).sum()
    contributions = []
    for piece in pieces:
        row = piece.piece.row
        own_loss, own = summed(only(windows, piece.piece), slice(row, row + 1))
        squares, products = (np.asarray(x) for x in _both_dots(own, gradients))
        contributions.append(
            _contribution(own_loss, squares, products, whole, loss, number, piece.piece.labels)
        )

    @jax.jit
    def update(params: Any, opt_state: Any, gradients: Any, loss: Array) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = program.optimizer.update(gradients, opt_state, params, loss=loss)
        updated = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        decayed = jax.tree.map(
            lambda p, on: p if on else jnp.zeros_like(p), params, decay_mask(params)
        )
        return updates, parameter_norms(params, gradients, updated), decayed

    updates, norms, decayed = update(params, opt_state, gradients, jnp.asarray(loss, dtype))
    step_rate = float(replay.rates[step - 1])
    decay = step_rate * options.optimizer.weight_decay
    direction = jax.tree.map(lambda u, p: u.astype(p.dtype) + decay * p, updates, decayed)
    grad_norm, clip_norm = float(np.sqrt(whole)), options.optimizer.clip_norm
    clip = 1.0 if clip_norm is None or grad_norm < clip_norm else clip_norm / grad_norm
    terms = Terms(
        step_rate,
        clip,
        float(global_norm(direction)),
        decay * float(global_norm(decayed)),
        float(global_norm(updates)),
    )
    return Recorded(
        dtype=str(dtype),
        loss=loss,
        grad_norm=grad_norm,
        num_tokens=number,
        groups=group_names(params),
        norms=jax.device_get(norms),
        branches=_branches(replay, params, windows),
        contributions=contributions,
        terms=terms,
    )


def _contribution(
    own_loss: float,
    squares: np.ndarray,
    products: np.ndarray,
    whole: float,
    loss: float,
    number: int,
    labels: int,
) -> Contribution:
    """From |g|^2 and g.G by group, of its part g of the gradient G, and |G|^2."""
    own, product = float(squares.sum()), float(products.sum())
    rest = max(whole - 2 * product + own, 0.0)
    norms = np.sqrt(own * rest)
    # the mean over the labels that are left
    scale = number / max(number - labels, 1)
    return Contribution(
        loss=own_loss * number / max(labels, 1),
        norm=float(np.sqrt(own)),
        cosine=float((product - own) / norms) if norms > 0 else 0.0,
        norm_without=float(np.sqrt(rest)) * scale,
        loss_without=(loss - own_loss) * scale,
        by_layer=np.sqrt(squares),
    )


def _parts(replay: Replay, windows: Window, rows: slice | None) -> list[Batch]:
    """The micro-batches; on one device of the given rows alone, which costs less."""
    batch = replay.program.batch
    if replay.program.mesh.size > 1:
        whole = placed(replay, windows)
        arrays = [getattr(whole, name) for name in windows]
    else:
        micro, count, seq = batch.input_ids.shape
        shape = (micro, count, seq) if rows is None else (1, rows.stop - rows.start, seq)
        arrays = [
            jnp.asarray((part if rows is None else part[rows]).reshape(shape))
            for part in windows.values()
        ]
    return [
        Batch(
            **dict(zip(windows, (array[index] for array in arrays), strict=True)), order=batch.order
        )
        for index in range(len(arrays[0]))
    ]


def _dots_of(one: Any, other: Any) -> Array:
    """The inner products by group: of each layer, and of each parameter that is in none."""
    flat, _ = jax.tree_util.tree_flatten_with_path(one)
    pairs = [(path, a * b) for (path, a), b in zip(flat, jax.tree.leaves(other), strict=True)]
    stacks = [
        jnp.sum(product, axis=tuple(range(1, product.ndim)))
        for path, product in pairs
        if is_stacked(path)
    ]
    rest = [jnp.sum(product)[None] for path, product in pairs if not is_stacked(path)]
    return jnp.concatenate([sum(stacks[1:], stacks[0]), *rest])


_dots = jax.jit(_dots_of)
_both_dots = jax.jit(lambda own, whole: (_dots_of(own, own), _dots_of(own, whole)))


def _branches(replay: Replay, params: Any, windows: Window) -> Branches:
    """Of all tokens of the batch, one micro-batch at a time."""

    @jax.jit
    def run(params: Any, part: Batch) -> Any:
        decoder = nnx.merge(replay.program.graphdef, params).model
        x, call = layer_inputs(decoder, part)

        def layer(x: Array, layer: DecoderLayer) -> tuple[Array, Any]:
            middle = layer.attend(x, call).hidden
            out = layer.feed_forward(middle, call)
            parts = x, middle - x, out - middle
            return out, jnp.stack([jnp.mean(jnp.square(part)) for part in parts])

        return jax.lax.scan(layer, x, decoder.layers)[1]

    squares = [np.asarray(run(params, part)) for part in _parts(replay, windows, None)]
    return Branches(*np.sqrt(np.mean(squares, axis=0)).T)


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
