"""Parameters, FLOPs, bytes and shapes of an architecture, from its config alone."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from llama_jax.checkpoints.names import name_table
from llama_jax.config import LlamaConfig
from llama_jax.models.causal_lm import LlamaForCausalLM

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint; `layer` is None outside the decoder layers."""

    name: str
    shape: tuple[int, ...]
    layer: int | None

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensors(config: LlamaConfig) -> list[Tensor]:
    """All tensors of the causal model in forward order, without allocating them."""
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    shapes = {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(nnx.state(model))}
    listed = [
        Tensor(name, shapes[slot.path][0 if slot.layer is None else 1 :], slot.layer)
        for name, slot in name_table(model).items()
    ]
    order = ("embed_tokens", "layers", "norm", "lm_head")
    return sorted(
        listed,
        key=lambda tensor: next(
            (index, tensor.layer or 0)
            for index, part in enumerate(order)
            if part in tensor.name.split(".")
        ),
    )


def parameter_count(config: LlamaConfig) -> int:
    """Number of parameters of the causal model; a tied head is counted once."""
    return sum(tensor.parameters for tensor in tensors(config))


def forward_flops_per_token(config: LlamaConfig, seq: int) -> int:
    """Multiply-adds counted as two, averaged over a causal sequence of `seq` tokens.

    2 * (weights of all projections and the head) + 4 * layers * heads * head_dim * (seq + 1) / 2. The
    embedding is a lookup; norms, softmax and activations are not counted. Backward is twice as much.
    """
    matrices = sum(
        tensor.parameters
        for tensor in tensors(config)
        if len(tensor.shape) == 2 and "embed_tokens" not in tensor.name
    )
    if config.tie_word_embeddings:
        matrices += config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_size
    return 2 * matrices + 2 * config.num_hidden_layers * width * (seq + 1)


def cache_bytes_per_token(config: LlamaConfig, itemsize: int) -> int:
    """Bytes of a token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.kv_heads * config.head_size * itemsize


def data_flow(config: LlamaConfig, batch: int, seq: int) -> list[tuple[str, tuple[int, ...]]]:
    """The shape of the data after each step of the forward pass."""
    hidden, heads, kv = config.hidden_size, config.num_attention_heads, config.kv_heads
    dim, intermediate = config.head_size, config.intermediate_size
    rows = (batch, seq)
    return [
        ("input_ids", rows),
        ("embed_tokens", (*rows, hidden)),
        ("cos, sin", (*rows, dim // 2)),
        ("each layer: input_layernorm", (*rows, hidden)),
        ("each layer: q_proj, rotated", (*rows, heads, dim)),
        ("each layer: k_proj, rotated", (*rows, kv, dim)),
        ("each layer: v_proj", (*rows, kv, dim)),
        ("each layer: attention weights", (batch, heads, seq, seq)),
        ("each layer: attention output", (*rows, heads * dim)),
        ("each layer: o_proj + residual", (*rows, hidden)),
        ("each layer: post_attention_layernorm", (*rows, hidden)),
        ("each layer: act(gate_proj) * up_proj", (*rows, intermediate)),
        ("each layer: down_proj + residual", (*rows, hidden)),
        ("norm", (*rows, hidden)),
        ("lm_head" + (" (tied)" if config.tie_word_embeddings else ""), (*rows, config.vocab_size)),
    ]


def show(name: str, config: LlamaConfig, *, batch: int, seq: int) -> None:
    """Print the architecture as tables."""
    from rich.table import Table

    from llama_jax.formatting import console, printable

    out = console()

    def table(title: str, *columns: str) -> Table:
        # not as the table's title, which would wrap a path to the table's width
        out.print(title, style="table.title", soft_wrap=True)
        made = Table()
        for index, column in enumerate(columns):
            made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        return made

    fields = table(f"{printable(name)}: configuration", "field", "value")
    for field, value in config.to_dict().items():
        if field not in config.extra_fields and field not in ("rope_theta", "rope_scaling"):
            fields.add_row(field, str(value))
    out.print(fields)

    everything = tensors(config)
    total = sum(tensor.parameters for tensor in everything)
    listing = table("tensors", "name", "shape", "parameters")
    layers = config.num_hidden_layers
    for tensor in everything:
        if tensor.layer in (None, 0):
            shown = tensor.name.replace(".layers.0.", f".layers.[0-{layers - 1}].")
            times = "" if tensor.layer is None else f"{layers} x "
            shape = " x ".join(map(str, tensor.shape))
            listing.add_row(shown, shape, f"{times}{tensor.parameters:,}")
    listing.add_section()
    for part, count in _blocks(everything).items():
        listing.add_row(part, "", f"{count:,}")
    listing.add_section()
    listing.add_row("total", "", f"{total:,}")
    out.print(listing)

    flops = forward_flops_per_token(config, seq)
    costs = table("cost", "quantity", "value")
    costs.add_row(f"forward FLOPs per token, causal sequence of {seq}", f"{flops:,}")
    costs.add_row("backward FLOPs per token", f"{2 * flops:,}")
    for dtype, size in BYTES.items():
        costs.add_row(f"weights in {dtype}", _size(total * size))
        per_token = cache_bytes_per_token(config, size)
        costs.add_row(f"KV cache in {dtype}, per token", f"{per_token:,} bytes")
        costs.add_row(
            f"KV cache in {dtype}, {batch} x {seq} tokens", _size(per_token * batch * seq)
        )
    out.print(costs)

    flow = table(f"forward pass, batch {batch}, sequence {seq}", "step", "shape")
    for step, dims in data_flow(config, batch, seq):
        flow.add_row(step, " x ".join(map(str, dims)))
    out.print(flow)


def _blocks(everything: list[Tensor]) -> dict[str, int]:
    """Parameters by block: embedding, attention, MLP and norms of one layer, all layers, head."""
    blocks: dict[str, int] = {}
    for tensor in everything:
        if tensor.layer is None:
            key = tensor.name.removesuffix(".weight")
            blocks[key] = blocks.get(key, 0) + tensor.parameters
            continue
        blocks["all layers"] = blocks.get("all layers", 0) + tensor.parameters
        if tensor.layer == 0:
            part = tensor.name.split(".layers.0.")[1].split(".")[0]
            for key in (f"one layer: {part}", "one layer"):
                blocks[key] = blocks.get(key, 0) + tensor.parameters
    return blocks


def _size(count: float) -> str:
    """Bytes in binary units, three digits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
