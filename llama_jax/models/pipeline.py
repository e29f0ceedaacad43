"""Pipeline parallelism: the layers are split over a mesh's stages, and micro-batches pass through them.

The schedule of GPipe (arXiv:1811.06965) or, with repeats, that of interleaved stages (arXiv:2104.04473): a
stage holds several blocks of layers, and a micro-batch goes around the ring of stages once for each of
them. All stages do the same in every iteration: run a block, pass the result on. Before a stage's first
micro-batch arrives, and after its last one has left, it computes what nobody reads.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, Shaped

from llama_jax.models.layers import DecoderLayer, LayerCall
from llama_jax.numerics.matmul import working_dtype
from llama_jax.numerics.remat import checkpointed
from llama_jax.numerics.remat_policy import Kept, Remat
from llama_jax.sharding import RESIDUAL_AXES, STAGE_AXIS, constrain, mesh_axes

# what is never kept for the backward pass: a part of an array that is kept
_SLICE = "pipeline_slice"


class Pipeline(NamedTuple):
    """How the layers run over the stages of the ambient mesh.

    Attributes:
        micro_batches: parts of the batch that pass through the stages; a multiple of their number.
        repeats: blocks of layers that each stage holds. More leave stages idle for a smaller share of the
            step, and every micro-batch is sent that many times as often.

    Examples:
        >>> from llama_jax.models.pipeline import Pipeline
        >>> Pipeline(micro_batches=8).bubble(stages=2), Pipeline(micro_batches=8, repeats=2).iterations(2)
        (0.1111111111111111, 17)
    """

    micro_batches: int
    repeats: int = 1

    def iterations(self, stages: int) -> int:
        """Blocks that each stage runs, those that nobody reads included."""
        return self.micro_batches * self.repeats + stages - 1

    def bubble(self, stages: int) -> float:
        """The share of a stage's iterations whose results nobody reads."""
        return (stages - 1) / self.iterations(stages)

    def require_fit(self, stages: int, layers: int, rows: int) -> None:
        """Raise ValueError for layers or rows of a batch that this does not divide."""
        if stages == 1:
            raise ValueError(
                f"pipeline: found no mesh with an axis {STAGE_AXIS!r} larger than 1, expected one in "
                "jax.set_mesh"
            )
        if self.repeats < 1 or layers % (stages * self.repeats):
            raise ValueError(
                f"pipeline: found {stages} stages x {self.repeats} repeats, expected their product to be a "
                f"divisor of {layers} layers"
            )
        if self.micro_batches < 1 or self.micro_batches % stages or rows % self.micro_batches:
            raise ValueError(
                f"pipeline: found {self.micro_batches} micro-batches, expected a multiple of {stages} "
                f"stages and a divisor of {rows} rows"
            )


def run_pipeline(
    pipeline: Pipeline,
    layers: DecoderLayer,
    x: Float[Array, "batch seq hidden"],
    call: LayerCall,
    dropout_keys: Key[Array, " layers"] | None,
    *,
    remat: Remat | Kept,
    scan_unroll: int,
) -> Float[Array, "batch seq hidden"]:
    """The output of all stacked layers: equal to a scan over them.

    Args:
        layers: stacked, the leading axis split over the stages in order. With repeats they are exchanged
            between stages first, as each then needs blocks that are not adjacent.
        x: rows split over the stages, as everything before and after the layers is.
        dropout_keys: one for each layer.
        scan_unroll: layers of a block for each iteration of the loop over it.

    Raises:
        ValueError: as `Pipeline.require_fit`.
    """
    stages = mesh_axes().size(STAGE_AXIS)
    count, rows = jax.tree.leaves(layers)[0].shape[0], x.shape[0]
    pipeline.require_fit(stages, count, rows)
    micro_batches, repeats = pipeline
    size = count // (stages * repeats)  # layers of a block

    def run_stage(layers: DecoderLayer, x: Array, call: LayerCall, keys: Array | None) -> Array:
        stage = jax.lax.axis_index(STAGE_AXIS)
        if repeats > 1:
            layers = jax.tree.map(lambda w: _deal_blocks(w, stages, repeats), layers)
        sinks = jax.tree.map(_gradient_sink, layers)
        layers = jax.lax.stop_gradient(layers)
        calls = jax.tree.map(lambda array: _all_micro_batches(array, pipeline, stages), call)

        def run_layer(x: Array, place: tuple[Array, Array, Array]) -> tuple[Array, None]:
            repeat, index, micro_batch = place
            layer = jax.tree.map(
                lambda weight, sink: _with_gradient(*_take((weight, sink), repeat * size + index)),
                layers,
                sinks,
            )
            key = None
            if keys is not None:
                # of every row, as without a pipeline, whatever rows a micro-batch has
                row_keys = jax.random.split(keys[(repeat * stages + stage) * size + index], rows)
                key = _take(_as_micro_batches(row_keys, pipeline, stages), micro_batch)
            out = layer(x, _take(calls, micro_batch), dropout_key=key)
            return out.hidden, None

        run_block = _checkpointed(run_layer, remat)

        def iterate(carry: tuple[Array, Array], time: Array) -> tuple[tuple[Array, Array], None]:
            stream, arrived = carry
            stream = _store(stream, arrived, time, stages)
            x = jnp.where(stage == 0, _take(stream, time % micro_batches), arrived)
            work = time - stage
            place = (
                jnp.broadcast_to(jnp.clip(work // micro_batches, 0, repeats - 1), (size,)),
                jnp.arange(size, dtype=jnp.int32),
                jnp.broadcast_to(work % micro_batches, (size,)),
            )
            x, _ = jax.lax.scan(run_block, x, place, unroll=min(scan_unroll, size))
            ring = [(source, (source + 1) % stages) for source in range(stages)]
            return (stream, _send(x, ring)), None

        # The first stage reads micro-batches from here and writes them back when they have been around the
        # ring; the others' copies are not used.
        x = constrain(x, *RESIDUAL_AXES)
        stream = _split_rows(_all_micro_batches(x, pipeline, stages))
        carry = stream, jnp.zeros_like(stream[0])
        iterations = pipeline.iterations(stages)
        (stream, arrived), _ = jax.lax.scan(iterate, carry, jnp.arange(iterations, dtype=jnp.int32))
        stream = _store(stream, arrived, jnp.int32(iterations), stages)
        out = _scatter_from_first(_split_rows(stream), stages).swapaxes(0, 1).reshape(x.shape)
        return constrain(out, *RESIDUAL_AXES)

    split = P(STAGE_AXIS)
    return jax.shard_map(
        run_stage,
        mesh=mesh_axes().mesh,
        in_specs=(split, split, split, P()),
        out_specs=split,
        axis_names={STAGE_AXIS},
        check_vma=False,
    )(layers, x, call, dropout_keys)


def _all_micro_batches(
    array: Shaped[Array, "rows ..."], pipeline: Pipeline, stages: int
) -> Shaped[Array, "micro_batches rows_of_each ..."]:
    """The micro-batches of all stages, from this stage's rows.

    A row stays on the devices of the data and fsdp axes that it is on, so every so many rows are of one
    micro-batch.
    """
    here = array.reshape(-1, pipeline.micro_batches // stages, *array.shape[1:]).swapaxes(0, 1)
    stage = jax.lax.axis_index(STAGE_AXIS)
    gathered = jnp.zeros((stages, *here.shape), here.dtype)
    for hops in range(stages):
        ring = [(source, (source + hops) % stages) for source in range(stages)]
        arrived = _send(here, ring)
        slot = (stage - hops) % stages
        gathered = jax.lax.dynamic_update_index_in_dim(gathered, arrived, slot, axis=0)
    return gathered.reshape(pipeline.micro_batches, *here.shape[1:])


def _scatter_from_first(
    stream: Float[Array, "micro_batches rows seq hidden"], stages: int
) -> Float[Array, "micro_batches_of_stage rows seq hidden"]:
    """Each stage's part of what the first stage has."""
    parts = stream.reshape(stages, -1, *stream.shape[1:])
    received = [_send(parts[target], [(0, target)]) for target in range(1, stages)]
    # of what was sent to others, a stage gets zeros
    return jnp.where(jax.lax.axis_index(STAGE_AXIS) == 0, parts[0], sum(received[1:], received[0]))


def _send(array: Array, pairs: list[tuple[int, int]]) -> Array:
    """Between stages. Collectives of other kinds would gather what other mesh axes split."""
    if all(source == target for source, target in pairs):
        return array
    return jax.lax.ppermute(array, STAGE_AXIS, pairs)


def _as_micro_batches(
    array: Shaped[Array, "rows ..."], pipeline: Pipeline, stages: int
) -> Shaped[Array, "micro_batches rows_of_each ..."]:
    """The same, of an array that every stage has in full."""
    rest = array.shape[1:]
    by_stage = array.reshape(stages, -1, pipeline.micro_batches // stages, *rest)
    return by_stage.swapaxes(1, 2).reshape(pipeline.micro_batches, -1, *rest)


def _split_rows(
    stream: Float[Array, "micro_batches rows seq hidden"],
) -> Float[Array, "micro_batches rows seq hidden"]:
    return constrain(stream, "micro_batches", *RESIDUAL_AXES)


def _store(stream: Array, arrived: Array, time: Array, stages: int) -> Array:
    """`stream` with what arrived at the first stage, once the first micro-batch has been around."""
    slot = (time - stages) % stream.shape[0]
    value = jnp.where(time >= stages, arrived, _take(stream, slot))
    return _split_rows(jax.lax.dynamic_update_index_in_dim(stream, value, slot, axis=0))


def _take(tree: Any, index: Array) -> Any:
    """Entry `index` of the leading axis of all arrays; taken again where the backward pass needs it."""

    def take(array: Array) -> Array:
        return checkpoint_name(
            jax.lax.dynamic_index_in_dim(array, index, axis=0, keepdims=False), _SLICE
        )

    return jax.tree.map(take, tree)


def _checkpointed(function: Callable[..., Any], remat: Remat | Kept) -> Callable[..., Any]:
    """`checkpointed`, but for "none", which would keep a layer's weights for every micro-batch."""
    if remat == "none":
        policy = jax.checkpoint_policies.save_anything_except_these_names(_SLICE)
        return jax.checkpoint(function, policy=policy, prevent_cse=False)
    return checkpointed(function, remat, in_scan=True)


# The gradient of a weight is a sum over micro-batches. JAX would sum in the weight's dtype and round each
# time; here an array of zeros in float32, whose values nobody reads, takes the weight's place.
@jax.custom_vjp
def _gradient_sink(weight: Array) -> Array:
    return jnp.zeros(weight.shape, working_dtype(weight.dtype))


def _gradient_sink_forward(weight: Array) -> tuple[Array, Array]:
    return _gradient_sink(weight), jnp.zeros((), weight.dtype)


def _gradient_sink_backward(like: Array, cotangent: Array) -> tuple[Array]:
    return (cotangent.astype(like.dtype),)


_gradient_sink.defvjp(_gradient_sink_forward, _gradient_sink_backward)


@jax.custom_vjp
def _with_gradient(weight: Array, sink: Array) -> Array:
    """`weight`, whose gradient goes to `sink`."""
    return weight


def _with_gradient_forward(weight: Array, sink: Array) -> tuple[Array, None]:
    return weight, None


def _with_gradient_backward(_: None, cotangent: Array) -> tuple[None, Array]:
    return None, cotangent.astype(working_dtype(cotangent.dtype))


_with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)


def _deal_blocks(
    weight: Shaped[Array, "layers ..."], stages: int, repeats: int
) -> Shaped[Array, "layers ..."]:
    """From a stage's part of the layers in order to blocks stage, stage + stages, stage + 2 * stages, ...

    In each of `repeats` rounds every stage sends one block and receives one: of the blocks for the same
    stage, those of different senders take turns.
    """
    blocks = weight.reshape(repeats, -1, *weight.shape[1:])
    stage = jax.lax.axis_index(STAGE_AXIS)
    common = math.gcd(repeats, stages)
    senders = np.arange(stages)
    dealt = jnp.zeros_like(blocks)
    for turn in range(repeats):
        at = turn // common * common + (turn + senders // (stages // common)) % common
        block = senders * repeats + at
        slots = np.zeros(stages, int)
        slots[block % stages] = block // stages
        sent = jax.lax.dynamic_index_in_dim(blocks, jnp.asarray(at)[stage], 0, keepdims=False)
        pairs = list(zip(senders.tolist(), (block % stages).tolist(), strict=True))
        sent = _send(sent, pairs)
        dealt = jax.lax.dynamic_update_index_in_dim(dealt, sent, jnp.asarray(slots)[stage], 0)
    return dealt.reshape(weight.shape)
