"""Everything that a run compiles: shapes, shardings, the step. No array exists yet.

`python -m train plan` compiles the same program for devices you need not have.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.attention.dispatch import Choice, choose_implementation
from llama_jax.attention.masks import AttentionMask
from llama_jax.attention.zigzag import ZigZag
from llama_jax.config import LlamaConfig
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.models.pipeline import Pipeline
from llama_jax.numerics.xla_options import run_once_compiler_options, step_compiler_options
from llama_jax.sharding import (
    BATCH_AXES,
    MESH_AXES,
    SEQUENCE_AXIS,
    STAGE_AXIS,
    parameter_shardings,
)
from train.data.batch import Batch
from train.options import (
    AverageOptions,
    GuardOptions,
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    SequenceOrder,
    warmup_steps,
)
from train.program.average import averaged
from train.program.guard import guarded
from train.program.mesh import count_slices, make_mesh
from train.program.mup import base_config, mup_scales, scale_by_name
from train.program.optimizer import make_optimizer
from train.program.optimizer_state import HOST_MEMORY, on_host, require_host_memory
from train.program.per_layer import Path, map_by_parameter
from train.program.pipeline import find_pipeline
from train.program.schedules import learning_rate_schedule
from train.program.statistics import make_observe
from train.program.step import make_evaluation, make_step


class Program(NamedTuple):
    """A run's functions, and abstract values (shape, dtype, sharding) of their arguments.

    step: jitted `(params, opt_state, batch, dropout_key)`, donating the first two.
    statistics_step: the same, returning statistics after the metrics.
    evaluate: jitted `(params, batch)`, returning summed loss and number of tokens.
    pipeline: how the layers run over the mesh's stages; None with a single one.
    initial_scales: factors on the initial values of the parameters of these names.
    """

    config: LlamaConfig
    mesh: Mesh
    graphdef: nnx.GraphDef[Any]
    optimizer: optax.GradientTransformationExtraArgs
    learning_rate: Callable[[Any], Any]
    params: Any
    opt_state: Any
    batch: Any
    step: jax.stages.Wrapped
    statistics_step: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    pipeline: Pipeline | None
    initial_scales: Mapping[str, float]


def run_program(
    options: RunOptions,
    config: LlamaConfig,
    devices: Sequence[Any] | None = None,
    **changes: Any,
) -> Program:
    """The program of a run of `config`, over `devices` (default: all devices of all processes).

    Args:
        changes: `learning_rate` and `wrap` of `make_program`.

    Raises:
        ValueError: as `make_mesh` and `make_program`.
    """
    return make_program(
        config,
        make_mesh({axis: getattr(options.mesh, axis) for axis in MESH_AXES}, devices),
        options.model,
        options.optimizer,
        guard=options.guard,
        average=options.average,
        options=options.mesh,
        steps=options.steps,
        batch_size=options.batch_size,
        micro_batches=options.micro_batches,
        sequence_length=options.sequence_length,
        deterministic=options.deterministic,
        **changes,
    )


def make_program(
    config: LlamaConfig,
    mesh: Mesh,
    model: ModelOptions,
    optimizer: OptimizerOptions,
    *,
    options: MeshOptions,
    guard: GuardOptions | None = None,
    average: AverageOptions | None = None,
    steps: int,
    batch_size: int,
    micro_batches: int,
    sequence_length: int,
    deterministic: bool = False,
    learning_rate: Callable[[Any], Any] | None = None,
    wrap: Callable[[Any], Any] | None = None,
) -> Program:
    """The program of a run over `mesh`.

    Args:
        options: how rows and layers are split over `mesh`, whose sizes it leaves to that.
        guard, average: what is added to the optimizer; None for nothing.
        deterministic: see `step_compiler_options`.
        learning_rate: of a step, from 0 on, instead of the schedule that the options describe.
        wrap: what makes of the whole rule, guard included, the one that is used.

    Raises:
        ValueError: a batch, sequence or number of heads that the mesh does not divide; a schedule that
            does not fit the steps; an attention implementation that cannot serve; base widths that do not
            fit the model.
    """
    _require_divisible(config, mesh, batch_size // micro_batches, sequence_length)
    pipeline = find_pipeline(options, config, mesh.shape, batch_size // micro_batches)
    if pipeline is not None and model.remat_offload:
        raise ValueError(
            f"model.remat-offload: found {' '.join(model.remat_offload)} with --mesh.stage "
            f"{mesh.shape[STAGE_AXIS]}, expected none: XLA brings the values of every block of layers "
            "back to the device at once; more --micro-batches save memory"
        )
    if options.fsdp_gather == "step" and config.attention_dropout:
        raise ValueError(
            f"mesh.fsdp-gather: found step for a model with attention_dropout {config.attention_dropout}, "
            "expected layer: all devices would draw the same numbers"
        )
    dtype = jnp.dtype(model.parameter_dtype)
    compute_dtype = jnp.dtype(model.compute_dtype or model.parameter_dtype)
    shape = micro_batches, batch_size // micro_batches, sequence_length
    window: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    order = _token_order(options.sequence_order, mesh, sequence_length)
    batch = Batch(window, window, window, window, order)
    attention_choice(config, mesh, model.attention, compute_dtype, batch)
    for option, used in (
        ("model.remat-offload", model.remat_offload),
        ("optimizer.offload", optimizer.offload),
    ):
        if used:
            require_host_memory(mesh.devices.flat[0], option)
    if jnp.float64 in (dtype, compute_dtype):
        jax.config.update("jax_enable_x64", True)  # otherwise JAX makes it float32
    abstract = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype))
    graphdef, state = nnx.split(abstract)
    params = _with_shardings(nnx.to_pure_dict(state), parameter_shardings(abstract, mesh))
    schedule = learning_rate or learning_rate_schedule(
        optimizer.schedule,
        peak=optimizer.learning_rate,
        steps=steps,
        warmup_steps=warmup_steps(optimizer, steps),
        final_fraction=optimizer.final_fraction,
        decay_fraction=optimizer.decay_fraction,
    )
    devices = list(mesh.devices.flat)
    base = base_config(model, config)
    scales = (
        {}
        if base is None
        else mup_scales(config, base, optimizer.name, zero_head=model.mup_zero_head)
    )
    rule = make_optimizer(
        optimizer.name,
        schedule,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        state_dtype=optimizer.state_dtype,
        scales={name: scale.update for name, scale in scales.items() if scale.update != 1},
    )
    if average is not None and average.decay is not None:
        rule = averaged(rule, average.decay)
    if guard is not None and (guard.action is not None or guard.non_finite):
        # outermost: what it leaves out has no part in the average
        rule = guarded(rule, guard)
    if wrap is not None:
        rule = wrap(rule)
    opt_state = _like_params(jax.eval_shape(rule.init, params), params, mesh)
    if optimizer.offload:
        rule, opt_state = on_host(rule), _in_host_memory(opt_state)
    forward: dict[str, Any] = {
        "remat": model.remat_policy,
        "scan_unroll": layers_per_iteration(model.scan_unroll, config.num_hidden_layers, devices),
        "attention_implementation": model.attention,
        "pipeline": pipeline,
    }
    step = partial(
        make_step,
        graphdef,
        rule,
        compute_dtype=compute_dtype,
        z_loss=optimizer.z_loss,
        reduce_dtype=_reduce_dtype(model, compute_dtype),
        gather_once=options.fsdp_gather == "step",
        **forward,
    )
    observe = make_observe(
        graphdef, compute_dtype=compute_dtype, attention_implementation=model.attention
    )
    evaluate = make_evaluation(graphdef, compute_dtype=compute_dtype, **forward)
    compiler_options = step_compiler_options(
        devices[0].platform, across_hosts=count_slices(devices) > 1, deterministic=deterministic
    )
    replicated = NamedSharding(mesh, PartitionSpec())

    def jitted(step: Callable[..., Any], *others: Any) -> jax.stages.Wrapped:
        return jax.jit(
            step,
            donate_argnums=(0, 1),
            compiler_options=compiler_options,
            out_shardings=(shardings_of(params), shardings_of(opt_state), *others),
        )

    return Program(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        optimizer=rule,
        learning_rate=schedule,
        params=params,
        opt_state=opt_state,
        batch=batch,
        step=jitted(step(), replicated),
        statistics_step=jitted(step(observe=observe), replicated, replicated),
        evaluate=jax.jit(evaluate, compiler_options=compiler_options, out_shardings=replicated),
        pipeline=pipeline,
        initial_scales={name: scale.initial for name, scale in scales.items()},
    )


def layers_per_iteration(requested: int | None, layers: int, devices: Sequence[Any]) -> int:
    """The `scan_unroll` of a run, at most all `layers`; for None the best for these devices.

    A single GPU runs all layers in one iteration: nothing is copied into and out of stacked arrays, which
    takes a tenth of the time on an H100, and no more memory. It would on several, which gather the layers.
    """
    if requested is not None:
        return min(requested, layers)
    return layers if len(devices) == 1 and devices[0].platform == "gpu" else 1


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batch arrays [micro, rows, seq]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, SEQUENCE_AXIS))


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of abstract or real arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def attention_choice(
    config: LlamaConfig, mesh: Mesh, implementation: str | None, dtype: jnp.dtype, batch: Batch
) -> Choice:
    """The attention of a step over an abstract batch, and why it is not a faster one.

    Raises:
        ValueError: `implementation` cannot do it.
    """
    segments: Any = jax.ShapeDtypeStruct(batch.input_ids.shape[1:], jnp.int32)
    query = jax.ShapeDtypeStruct(
        (*segments.shape, config.num_attention_heads, config.head_size), dtype
    )
    mask = AttentionMask(query_segments=segments, key_segments=segments, order=batch.order)
    with jax.set_mesh(mesh):
        return choose_implementation(implementation, query, mask, bool(config.attention_dropout))


def initial_params(program: Program, seed: int) -> Any:
    """Random parameters: each device makes its own shards; the numbers do not depend on the mesh."""

    def init(key: Any) -> Any:
        dtype = jax.tree.leaves(program.params)[0].dtype
        model = LlamaForCausalLM(program.config, rngs=nnx.Rngs(params=key), dtype=dtype)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return scale_by_name(params, program.initial_scales)

    return _jit_once(program, init, program.params)(jax.random.key(seed))


def initial_opt_state(program: Program, params: Any) -> Any:
    """The optimizer state before the first step."""
    return _jit_once(program, program.optimizer.init, program.opt_state)(params)


def _jit_once(program: Program, function: Callable[..., Any], result: Any) -> jax.stages.Wrapped:
    """`function`, whose result is like `result`."""
    options = run_once_compiler_options(program.mesh.devices.flat[0].platform)
    return jax.jit(function, compiler_options=options, out_shardings=shardings_of(result))


def model_of(program: Program, params: Any) -> LlamaForCausalLM:
    """The model with `params`."""
    return nnx.merge(program.graphdef, params)


def _reduce_dtype(model: ModelOptions, compute_dtype: jnp.dtype) -> jnp.dtype | None:
    """The dtype in which gradients are summed over devices; None for that in which they accumulate."""
    if model.reduce_dtype == "float32":
        return None
    if compute_dtype != model.reduce_dtype:
        raise ValueError(
            f"model.reduce-dtype: found {model.reduce_dtype} with --model.compute-dtype {compute_dtype}, "
            "expected float32, or both bfloat16"
        )
    return compute_dtype


def _token_order(order: SequenceOrder, mesh: Mesh, sequence_length: int) -> ZigZag | None:
    """The order of the tokens of a row; None for the row's own."""
    shards = mesh.shape[SEQUENCE_AXIS]
    if shards == 1 or order == "contiguous":
        return None
    if sequence_length % (2 * shards):
        raise ValueError(
            f"sequence-length: found {sequence_length}, expected a multiple of {2 * shards}, twice the "
            "mesh's sequence axis; or --mesh.sequence-order contiguous, with more work for later shards"
        )
    return ZigZag.of(sequence_length, shards)


def _require_divisible(config: LlamaConfig, mesh: Mesh, rows: int, sequence_length: int) -> None:
    sizes = mesh.shape
    batch_shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    if rows % batch_shards:
        axes = " x ".join(axis for axis in BATCH_AXES if axis != STAGE_AXIS or sizes[axis] > 1)
        raise ValueError(
            f"batch-size: found {rows} rows in a micro-batch, expected a multiple of {axes} = "
            f"{batch_shards}"
        )
    if sequence_length % sizes["sequence"]:
        raise ValueError(
            f"sequence-length: found {sequence_length}, expected a multiple of the mesh's sequence axis "
            f"{sizes['sequence']}"
        )
    if config.num_attention_heads % sizes["tensor"]:
        raise ValueError(
            f"mesh.tensor: found {sizes['tensor']}, expected a divisor of the "
            f"{config.num_attention_heads} attention heads"
        )


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _like_params(opt_state: Any, params: Any, mesh: Mesh) -> Any:
    """Shard each leaf of the optimizer state like the parameter it belongs to; replicate the rest."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    params_by_path: dict[Any, Any] = dict(flat)

    def shard(leaf: Any, path: Path | None) -> Any:
        spec = PartitionSpec() if path is None else _spec_like(leaf, params_by_path[path])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return map_by_parameter(shard, opt_state, params)


def _in_host_memory(opt_state: Any) -> Any:
    """Abstract arrays of an optimizer's state in the host's memory, but for counts of steps."""

    def move(leaf: Any) -> Any:
        if not leaf.ndim:
            return leaf
        sharding = leaf.sharding.with_memory_kind(HOST_MEMORY)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(move, opt_state)


def _spec_like(leaf: Any, parameter: Any) -> PartitionSpec:
    """The parameter's spec, for an array of its shape or of its shape reduced over one axis."""
    shape, spec = parameter.shape, parameter.sharding.spec
    if leaf.shape == shape:
        return spec
    for axis in range(len(shape)):
        if leaf.shape == shape[:axis] + shape[axis + 1 :]:
            return PartitionSpec(*spec[:axis], *spec[axis + 1 :])
    return PartitionSpec()
