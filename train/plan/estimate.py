"""What a configuration should cost, from its shapes alone: which to compile first, and what would help."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.inspection.architecture import forward_flops_per_token, parameter_count
from llama_jax.numerics.remat import Remat
from train.hardware.chips import Chip
from train.options import RunOptions

# Adam's two moments beside each parameter, then its gradient; other optimizers have less.
_STATE_COPIES = 3


class Model(NamedTuple):
    """What an estimate knows of a model, reckoned once for all configurations of it."""

    config: LlamaConfig
    parameters: int
    forward_flops: int


class Estimate(NamedTuple):
    """Bytes of one device, and seconds of its products and of what it sends."""

    state: float
    gradients: float
    activations: float
    head: float
    compute: float
    links: float

    @property
    def peak(self) -> float:
        """All at once."""
        return self.state + self.gradients + self.activations + self.head


def measure(config: LlamaConfig, sequence_length: int) -> Model:
    """Parameters, and forward FLOPs of a token."""
    flops = forward_flops_per_token(config, sequence_length)
    return Model(config, parameter_count(config), flops)


def estimate(
    options: RunOptions, model: Model, sizes: Mapping[str, int], chip: Chip | None
) -> Estimate:
    """Of one configuration over a mesh of `sizes`; seconds are those of a TPU v5p without a `chip`."""
    wide = jnp.dtype(options.model.parameter_dtype).itemsize
    narrow = jnp.dtype(options.model.compute_dtype).itemsize
    config, parameters = model.config, model.parameters
    tensor, sequence = sizes["tensor"], sizes["sequence"]
    devices = math.prod(sizes.values())
    parts = sizes["fsdp"] * sequence * tensor
    tokens = options.batch_size * options.sequence_length
    local = tokens * tensor / devices / options.micro_batches
    kept = kept_numbers(config, options.model.remat, tensor)
    table = config.vocab_size * config.hidden_size / tensor
    head = table * (4 + 2 * narrow) + local * config.hidden_size * 4

    passes = 4 if options.model.remat == "full" else 3
    flops = passes * model.forward_flops * tokens
    # weights are gathered forwards and backwards, gradients reduced; over tensor, activations are summed
    # twice a layer each way, and once more where the forward pass is done again
    weights = parameters * narrow / tensor
    sent = options.micro_batches * weights * (2 + 2) if parts > tensor else 0.0
    sums = 6 if options.model.remat == "full" else 4
    width = config.num_hidden_layers * config.hidden_size
    sent += 2 * sums * local * options.micro_batches * width * narrow if tensor > 1 else 0.0
    # over sequence, keys and values are gathered as often, and their gradients summed; over data,
    # gradients once more
    keys = 2 * config.kv_heads * config.head_size / tensor * config.num_hidden_layers
    row = local * options.micro_batches * sequence
    sent += (passes - 1) * row * keys * narrow if sequence > 1 else 0.0
    sent += 2 * parameters * wide / parts if sizes["data"] > 1 else 0.0
    peak, link = (chip.flops, chip.link_bandwidth) if chip else (459e12, 600e9)
    return Estimate(
        state=parameters * wide * _STATE_COPIES / parts,
        gradients=parameters * (wide + narrow) / parts,
        activations=local * config.num_hidden_layers * kept * narrow,
        head=head,
        compute=flops / devices / peak,
        links=sent / link,
    )


def kept_numbers(config: LlamaConfig, remat: Remat, tensor: int = 1) -> float:
    """Numbers that a layer keeps of each token for its backward pass, on a device of `tensor`."""
    hidden = config.hidden_size
    if remat == "full":
        return hidden
    queries = config.num_attention_heads * config.head_size / tensor
    keys = config.kv_heads * config.head_size / tensor
    intermediate = config.intermediate_size / tensor
    dots = 3 * hidden + 2 * queries + 2 * keys + 2 * intermediate
    # without any recomputation also what norms, rotations and the activation made, some of it in float32
    return dots if remat == "dots" else dots + 6 * hidden + queries + keys + 2 * intermediate
