"""What a configuration should cost, from its shapes alone: which to compile first, and what would help.

Every term counts what one device holds, computes or sends in a step. Where a collective runs over n devices
its (n - 1) / n is taken as 1, so traffic is slightly overestimated.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.inspection.architecture import forward_flops_per_token, parameter_count
from llama_jax.models.pipeline import Pipeline
from llama_jax.numerics.remat import POLICIES
from llama_jax.numerics.remat_policy import Kept, Remat
from llama_jax.sharding import MESH_AXES
from train.hardware.chips import CHIPS, Chip
from train.options import RunOptions
from train.program.pipeline import find_pipeline

# what seconds are reckoned for where the chip is unknown: a TPU v5p
DEFAULT_CHIP = CHIPS["TPU v5"]

FLOAT32_BYTES = 4

# Bytes that a device sends for each byte of the array, by the algorithms that send least (Thakur,
# Rabenseifner and Gropp, 2005): an all-reduce is a reduce-scatter followed by an all-gather.
ALL_GATHER = 1
REDUCE_SCATTER = 1
ALL_REDUCE = REDUCE_SCATTER + ALL_GATHER


class Model(NamedTuple):
    """What an estimate needs of a model, computed once for all configurations of it."""

    config: LlamaConfig
    parameters: int
    forward_flops: int  # of a token


class Estimate(NamedTuple):
    """Bytes that one device holds, and seconds of its matmuls and of what it sends, for one step.

    state: parameters and optimizer state. activations: what the layers keep for the backward pass.
    head: the vocabulary projection and the loss. sent: bytes that take the seconds of `links`, of which
        weights_sent are weights that fsdp gathers, and their gradients.
    """

    state: float
    gradients: float
    activations: float
    head: float
    compute: float
    links: float
    sent: float
    weights_sent: float

    @property
    def peak(self) -> float:
        """Bytes if all of them are live at once."""
        return self.state + self.gradients + self.activations + self.head


class Setting(NamedTuple):
    """One configuration over one mesh, in the numbers that the terms are made of.

    parameter_bytes, compute_bytes: of one number in the parameters' and the computation's dtype.
    moment_bytes: of one number of the optimizer's moments; 0 if they are kept in the host's memory.
    average_bytes: of one number of the average of the parameters; 0 if there is none, or as the moments.
    reduce_bytes: of one number of a weight's gradient while devices add it up.
    parameter_shards: parts that a stage's parameters are split into, over fsdp, sequence and tensor.
    tokens: of a step, on one device; with tensor parallelism, of the device's tensor group.
    stages, pipeline: a single micro-batch for a single stage. The vocabulary, which every stage has, counts
        as if it were split like the layers.
    linked: devices of a host, beyond which there is a network; None where all are linked.
    gathered_over: fsdp's size if it gathers weights and reduces gradients once a step, else 1.
    """

    config: LlamaConfig
    parameters: int
    remat: Remat | Kept
    micro_batches: int
    parameter_bytes: int
    moment_bytes: int
    average_bytes: int
    compute_bytes: int
    reduce_bytes: int
    data: int
    sequence: int
    tensor: int
    parameter_shards: int
    tokens: float
    stages: int = 1
    pipeline: Pipeline = Pipeline(1)
    linked: int | None = None
    gathered_over: int = 1

    @property
    def busy(self) -> float:
        """The share of a stage's work on the layers whose results are used."""
        return 1 - self.pipeline.bubble(self.stages)


def measure(config: LlamaConfig, sequence_length: int) -> Model:
    """Count the model's parameters, and the forward FLOPs of a token."""
    flops = forward_flops_per_token(config, sequence_length)
    return Model(config, parameter_count(config), flops)


def estimate(
    options: RunOptions,
    model: Model,
    sizes: Mapping[str, int],
    chip: Chip | None,
    linked: int | None = None,
) -> Estimate:
    """The cost of one configuration.

    Args:
        options: with `model.compute_dtype` filled in.
        sizes: of the mesh's axes; those left out are 1.
        chip: None stands for `DEFAULT_CHIP`.
        linked: devices of a host, where hosts are connected by a network.

    Raises:
        ValueError: as `find_pipeline`.
    """
    chip = chip or DEFAULT_CHIP
    sizes = dict.fromkeys(MESH_AXES, 1) | dict(sizes)
    devices = math.prod(sizes.values())
    step_tokens = options.batch_size * options.sequence_length
    optimizer = options.optimizer
    moments = jnp.dtype(optimizer.state_dtype or options.model.parameter_dtype)
    averages = options.average.decay is not None and not optimizer.offload
    rows = options.batch_size // options.micro_batches
    pipeline = find_pipeline(options.mesh, model.config, sizes, rows)
    parameter_bytes = jnp.dtype(options.model.parameter_dtype).itemsize
    compute_bytes = jnp.dtype(options.model.compute_dtype).itemsize
    reduces_in_bfloat16 = options.model.reduce_dtype == "bfloat16"
    setting = Setting(
        config=model.config,
        parameters=model.parameters,
        remat=options.model.remat_policy,
        micro_batches=options.micro_batches,
        parameter_bytes=parameter_bytes,
        moment_bytes=0 if optimizer.offload else moments.itemsize,
        average_bytes=max(parameter_bytes, FLOAT32_BYTES) if averages else 0,
        compute_bytes=compute_bytes,
        reduce_bytes=compute_bytes if reduces_in_bfloat16 else max(compute_bytes, FLOAT32_BYTES),
        data=sizes["data"],
        sequence=sizes["sequence"],
        tensor=sizes["tensor"],
        parameter_shards=sizes["fsdp"] * sizes["sequence"] * sizes["tensor"],
        tokens=step_tokens * sizes["tensor"] / devices,
        stages=sizes["stage"],
        pipeline=pipeline or Pipeline(1),
        linked=linked,
        gathered_over=sizes["fsdp"] if options.mesh.fsdp_gather == "step" else 1,
    )
    flops = (_forward_passes(setting) + 2) * model.forward_flops * step_tokens
    return Estimate(
        state=state_bytes(setting),
        gradients=gradient_bytes(setting),
        activations=activation_bytes(setting),
        head=head_bytes(setting),
        compute=flops / devices / chip.flops / setting.busy,
        links=link_seconds(setting, chip),
        sent=sum(sent for sent, *_ in _traffic(setting)),
        weights_sent=weight_traffic(setting),
    )


def _forward_passes(setting: Setting) -> float:
    """Passes through the layers' projections: those whose output is not kept run again.

    Two with "full", which keeps none; the backward pass costs two by itself.
    """
    sizes = widths(setting.config)
    # columns of the weights, each of as many rows as there are hidden numbers
    columns = {name: sizes[name] for name in ("query", "key", "value", "gate", "up")}
    columns |= {"output": sizes["query"], "down": sizes["gate"]}
    again = sum(columns[name] for name in columns.keys() - _kept(setting.remat))
    return 1 + again / sum(columns.values())


def _kept(remat: Remat | Kept) -> set[str]:
    """Names of the values that need not be computed again."""
    kept = remat if isinstance(remat, Kept) else POLICIES.get(remat, POLICIES["dots"])
    return {*kept.saved, *kept.offloaded}


def link_seconds(setting: Setting, chip: Chip) -> float:
    """Seconds on the links, or on the network between hosts: the longer of the two.

    Devices next to each other are those of a tensor group, then of sequence, fsdp, data and stage.
    """
    traffic = _traffic(setting)
    seconds = sum(sent for sent, *_ in traffic) / chip.link_bandwidth
    if setting.linked is None or chip.network_bandwidth is None:
        return seconds
    between_hosts = 0.0
    for sent, size, apart in traffic:
        neighbors = max(setting.linked // apart, 1)  # of a group, on one host
        if size > neighbors:
            between_hosts += sent / neighbors
    return max(seconds, between_hosts / chip.network_bandwidth)


def _traffic(setting: Setting) -> list[tuple[float, int, int]]:
    """Bytes, the size of the groups that exchange them, and how far apart a group's devices are."""
    shards = setting.parameter_shards
    return [
        (tensor_parallel_traffic(setting), setting.tensor, 1),
        (sequence_parallel_traffic(setting), setting.sequence, setting.tensor),
        (weight_traffic(setting), shards // setting.tensor, setting.tensor),
        (data_parallel_traffic(setting), setting.data, shards),
        (pipeline_traffic(setting), setting.stages, setting.data * shards),
    ]


def state_bytes(setting: Setting) -> float:
    """The parameters, their average, and Adam's two moments of each; other optimizers have less."""
    bytes_each = setting.parameter_bytes + 2 * setting.moment_bytes + setting.average_bytes
    return setting.parameters * bytes_each / (setting.parameter_shards * setting.stages)


def gradient_bytes(setting: Setting) -> float:
    """The gradient as the backward pass computes it, and cast to the parameters' dtype or added up.

    Gathered once a step, weights are held as well, and of neither is there a part for each device of fsdp.
    """
    compute, parameter = setting.compute_bytes, setting.parameter_bytes
    shards = setting.parameter_shards * setting.stages
    if setting.gathered_over == 1:
        return setting.parameters * (compute + parameter) / shards
    sums = max(compute, FLOAT32_BYTES) if setting.micro_batches > 1 else 0
    held = (2 * compute + sums) * setting.gathered_over + parameter
    return setting.parameters * held / shards


def activation_bytes(setting: Setting) -> float:
    """What a stage's layers keep of a micro-batch for its backward pass, what nobody reads included."""
    tokens = setting.tokens / setting.micro_batches
    numbers = kept_numbers(setting.config, setting.remat, setting.tensor)
    kept = tokens * setting.config.num_hidden_layers * numbers * setting.compute_bytes
    return kept / setting.busy


def head_bytes(setting: Setting) -> float:
    """The fused loss (`llama_jax.loss`): no logits, but gradients of both its operands.

    The gathered table and the gradient rounded to its dtype, the gradient summed in float32, and the
    gradient of the hidden states of a micro-batch in float32.
    """
    config = setting.config
    table = config.vocab_size * config.hidden_size / setting.tensor
    hidden = setting.tokens / setting.micro_batches * config.hidden_size
    return table * (2 * setting.compute_bytes + FLOAT32_BYTES) + hidden * FLOAT32_BYTES


def weight_traffic(setting: Setting) -> float:
    """Fully sharded parameters (ZeRO 3, arXiv:1910.02054): bytes sent for every micro-batch.

    In a pipeline, for every block of layers that a stage runs. Weights are gathered for the forward and
    again for the backward pass. Their gradients are all-reduced: that is what XLA compiles, where a
    reduce-scatter would do with half. With `gathered_over`, fsdp does so once a step (ZeRO 1), and what
    remains is over the sequence axis.
    """
    if setting.parameter_shards == setting.tensor:
        return 0.0  # every device has the weights it needs
    gathered, reduced = setting.compute_bytes * ALL_GATHER, setting.reduce_bytes * ALL_REDUCE
    once = 0.0
    if setting.gathered_over > 1:
        weights = setting.parameters / (setting.tensor * setting.sequence * setting.stages)
        once = weights * (gathered + reduced)
        if setting.sequence == 1:
            return once
    blocks = setting.stages * setting.pipeline.repeats
    weights = setting.parameters / (setting.tensor * blocks)
    times = setting.micro_batches * setting.pipeline.iterations(setting.stages)
    return once + times * weights * (2 * gathered + reduced)


def tensor_parallel_traffic(setting: Setting) -> float:
    """Tensor parallelism with the tokens split between blocks (Megatron-LM 3, arXiv:2205.05198).

    Attention and MLP each gather the tokens of their input and scatter those of their output, summed in
    float32; the backward pass gathers and scatters the gradients. What the backward pass needs of the
    forward pass is gathered again unless it is kept, and the sum after attention scattered again.
    """
    if setting.tensor == 1:
        return 0.0
    gathers = 2 * (2 if setting.remat == "none" else 3)
    scatters = 2 * 2 + ("output" not in _kept(setting.remat))
    gathered = gathers * ALL_GATHER * setting.compute_bytes
    scattered = scatters * REDUCE_SCATTER * max(setting.compute_bytes, FLOAT32_BYTES)
    numbers = setting.tokens * setting.config.hidden_size * setting.config.num_hidden_layers
    return numbers * (gathered + scattered) / setting.busy


def sequence_parallel_traffic(setting: Setting) -> float:
    """Rows split over devices: each gathers the keys and values of its whole rows.

    In every layer and each forward pass; the backward pass reduce-scatters their gradients.
    """
    if setting.sequence == 1:
        return 0.0
    config = setting.config
    row_tokens = setting.tokens * setting.sequence
    keys_and_values = 2 * config.kv_heads * config.head_size / setting.tensor
    each_pass = row_tokens * keys_and_values * config.num_hidden_layers * setting.compute_bytes
    gathers = 1 if "attention" in _kept(setting.remat) else 2
    return each_pass * (gathers * ALL_GATHER + REDUCE_SCATTER) / setting.busy


def data_parallel_traffic(setting: Setting) -> float:
    """Replicas of the model: gradients are all-reduced once a step, for all micro-batches.

    For each of them with dropout, and beside a tensor axis unless weights are gathered once, too: see
    `train.program.accumulation.axes_summed_once`.
    """
    if setting.data == 1:
        return 0.0
    shards = setting.parameter_shards * setting.stages
    beside_tensor = setting.tensor > 1 and setting.gathered_over == 1
    for_each = bool(setting.config.attention_dropout) or beside_tensor
    times = setting.micro_batches if for_each else 1
    return times * setting.parameters * setting.reduce_bytes / shards * ALL_REDUCE


def pipeline_traffic(setting: Setting) -> float:
    """What a stage passes on after every block, forward and backward, and what of weights it exchanges.

    The rows are gathered for the first stage and scattered when they are done; with repeats, the weights
    are dealt to the stages in the forward and their gradients in the backward pass.
    """
    if setting.stages == 1:
        return 0.0
    pipeline, micro_batches = setting.pipeline, setting.micro_batches
    tokens = setting.tokens * setting.stages / setting.tensor
    rows = tokens * setting.config.hidden_size * setting.compute_bytes
    blocks = rows * pipeline.iterations(setting.stages) / pipeline.micro_batches
    dealt = 0.0
    if pipeline.repeats > 1:
        shards = setting.parameter_shards * setting.stages
        dealt = setting.parameters * setting.compute_bytes / shards * micro_batches
    return 2 * (blocks + dealt) + rows * 2 * (ALL_GATHER + REDUCE_SCATTER)


def kept_numbers(config: LlamaConfig, remat: Remat | Kept, tensor: int = 1) -> float:
    """Numbers, counted in the computation's dtype, that a layer keeps of a token for its backward pass.

    "full" keeps the layer's input. "dots" keeps that and the output of every matmul: q, k, v, attention
    and o; gate, up and down. "none" keeps in addition what lies between them: of both norms the float32
    input (two numbers) and the output, rotated q and k, silu(gate) and silu(gate) * up. What is offloaded
    to the host's memory does not count.

    Args:
        tensor: size of the mesh's tensor axis, which splits heads, MLP and, but for the norms' outputs,
            the hidden states by their tokens.
    """
    sizes = widths(config, tensor)
    if isinstance(remat, Kept):
        return sum(sizes[name] for name in {"input", *remat.saved} - {*remat.offloaded})
    if remat == "full":
        return sizes["input"]
    dots = sum(sizes.values())
    if remat == "dots":
        return dots
    norms = 2 * (2 * sizes["input"] + config.hidden_size)
    rotated = sizes["query"] + sizes["key"]
    activation = 2 * sizes["gate"]
    return dots + norms + rotated + activation


def widths(config: LlamaConfig, tensor: int = 1) -> dict[str, float]:
    """Numbers of a token in a layer's input, the outputs of its projections, and attention's, by name."""
    hidden = config.hidden_size / tensor
    queries = config.num_attention_heads * config.head_size / tensor
    keys = config.kv_heads * config.head_size / tensor
    intermediate = config.intermediate_size / tensor
    return {
        "input": hidden,
        "query": queries,
        "key": keys,
        "value": keys,
        "attention": queries,
        "output": hidden,
        "gate": intermediate,
        "up": intermediate,
        "down": hidden,
    }
