"""A training step beside torch's: loss, every gradient and AdamW, in one process, in turn.

On a CPU a model of 56M parameters, batch 4 x 512, float32 and bfloat16 compute over float32 weights; on a
GPU Llama-3.2-1B's shapes, batch 1 x 4096, bfloat16. Memory is what a step takes beyond weights and
optimizer state: XLA's temporary buffers, and torch's peak by its profiler. What torch cannot do here is
left out and named.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from llama_jax import PRESETS, LlamaConfig, LlamaForCausalLM, fused_linear_cross_entropy
from llama_jax.compiler import step_compiler_options
from llama_jax.loss import shift_labels

SMALL = LlamaConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    rms_norm_eps=1e-5,
)
ROUNDS = 5
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, by NVIDIA


class Setting(NamedTuple):
    """What suits a backend."""

    config: LlamaConfig
    batch: int
    seq: int
    dtypes: tuple[str, ...]


class Row(NamedTuple):
    """One program: its step, which returns the loss, and the bytes it takes meanwhile."""

    name: str
    dtype: str
    step: Callable[[], float]
    memory: int


def setting() -> Setting:
    """The model and batch for the default backend."""
    if jax.default_backend() == "cpu":
        return Setting(SMALL, 4, 512, ("float32", "bfloat16"))
    return Setting(PRESETS["llama-3.2-1b"], 1, 4096, ("bfloat16",))


def our_step(given: Setting, ids: np.ndarray, dtype: str, **options: Any) -> Row:
    """Weights and moments in float32, cast at the start of the loss; the loss-in-head; optax.adamw."""
    model = LlamaForCausalLM(given.config, rngs=nnx.Rngs(0))
    optimizer = optax.adamw(1e-4)

    def loss_of(model: LlamaForCausalLM, ids: jax.Array) -> jax.Array:
        model = jax.tree.map(lambda weight: weight.astype(dtype), model)
        hidden = model.model(ids, **options).last_hidden_state
        tied = given.config.tie_word_embeddings
        head = (model.model.embed_tokens if tied else model.lm_head).weight[...]
        return fused_linear_cross_entropy(hidden, head, shift_labels(ids), vocab_axis=0).loss

    @partial(jax.jit, donate_argnums=(0, 1), compiler_options=step_compiler_options())
    def step(model: Any, state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(model, ids)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, loss

    held = [model, optimizer.init(model)]
    rows = jnp.asarray(ids, jnp.int32)
    compiled = step.lower(*held, rows).compile()
    analysis: Any = compiled.memory_analysis()

    def run() -> float:
        held[0], held[1], loss = compiled(*held, rows)
        return float(jax.block_until_ready((held, loss))[1])

    return Row("ours", dtype, run, analysis.temp_size_in_bytes)


def torch_step(given: Setting, ids: np.ndarray, dtype: str, compile_it: bool) -> Row:
    """Hugging Face's model with `sdpa`, autocast for bfloat16, torch's fused AdamW."""
    import torch
    import transformers

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    config = transformers.LlamaConfig(**given.config.to_dict(), attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).to(device).train()
    program = torch.compile(model) if compile_it else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = torch.from_numpy(ids).to(device)
    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        with mixed:
            loss = program(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    run()  # the moments are allocated
    optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        memory = torch.cuda.max_memory_allocated() - before
    else:
        memory = torch_cpu_peak(run)
    return Row("torch.compile" if compile_it else "torch eager", dtype, run, memory)


def torch_cpu_peak(run: Callable[[], Any]) -> int:
    """The highest sum of what torch's allocator handed out and took back during `run`."""
    import torch

    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.max(np.cumsum([size for _, size in memory])))


def model_flops(given: Setting) -> float:
    """Of one step: 6 a weight of a product and token, 12 * layers * heads * dim * seq / 2 for attention."""
    config, tokens = given.config, given.batch * given.seq
    heads = config.num_attention_heads * config.head_size
    kv_heads = config.kv_heads * config.head_size
    per_layer = config.hidden_size * (2 * heads + 2 * kv_heads + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * per_layer + config.vocab_size * config.hidden_size
    return tokens * (6 * weights + 6 * config.num_hidden_layers * heads * given.seq)


def main() -> None:
    """Print the table."""
    given = setting()
    ids = np.random.default_rng(0).integers(0, given.config.vocab_size, (given.batch, given.seq))
    rows, missing = [], []
    for dtype in given.dtypes:
        rows.append(our_step(given, ids, dtype))
        if importlib.util.find_spec("transformers") is None:
            missing.append("torch: not installed")
            continue
        rows.append(torch_step(given, ids, dtype, compile_it=False))
        try:
            rows.append(torch_step(given, ids, dtype, compile_it=True))
        except Exception as error:  # no compiler, or one that it does not like
            missing.append(f"torch.compile {dtype}: {str(error).splitlines()[0]}")

    for row in rows:
        row.step()
    times: list[list[float]] = [[] for _ in rows]
    for _ in range(ROUNDS):
        for row, seconds in zip(rows, times, strict=True):  # in turn: drift hits all alike
            begin = time.perf_counter()
            row.step()
            seconds.append(time.perf_counter() - begin)
    kind = jax.devices()[0].device_kind
    table = Table(
        title=f"training step, {given.batch} x {given.seq} tokens, {kind}, median of {ROUNDS}"
    )
    columns = ("", "compute", "seconds", "/ torch eager", "tokens/s", "MiB", "/ torch eager", "MFU")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)
    for row, seconds in zip(rows, times, strict=True):
        median = statistics.median(seconds)
        base = next(
            (
                (statistics.median(other), peer.memory)
                for peer, other in zip(rows, times, strict=True)
                if (peer.name, peer.dtype) == ("torch eager", row.dtype)
            ),
            None,
        )
        table.add_row(
            row.name,
            row.dtype,
            f"{median:.3f}",
            f"{median / base[0]:.2f}" if base else "",
            f"{given.batch * given.seq / median:.0f}",
            f"{row.memory / 2**20:.0f}",
            f"{row.memory / base[1]:.2f}" if base else "",
            f"{model_flops(given) / median / peak:.1%}" if peak else "",
        )
    console = Console(width=110)
    console.print(table)
    console.print(
        "MFU: 6 x weights in products x tokens + 6 x layers x heads x dim x seq x tokens (causal)"
    )
    for line in missing:
        console.print(f"left out: {line}")


if __name__ == "__main__":
    main()
