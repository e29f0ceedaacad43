"""Greedy decoding and prefill against transformers, alternating in one process.

On a CPU: the real checkpoint in float32, batch 1 and 8, no row ending early. On a GPU: Llama 3.2 1B's
shape in bfloat16, where transformers' static cache also brings torch.compile. The time of a decoding step
is (time of NEW tokens - time of the first token) / (NEW - 1). "of bandwidth" is the time of reading as many
bytes as the weights have, measured in the same rounds, over that of a step.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from benchmarks.real_checkpoint import real_checkpoint
from llama_jax import PRESETS, LlamaForCausalLM, formatting

PROMPT, NEW, ROUNDS = 16, 128, 3
BATCHES = (1, 8)
PREFILL = 1024
PASSES = 20  # of the reader: a single one is as short as a scheduler's time slice

# of ids [batch, seq] and a number of new tokens; returns when the last one is computed
Generate = Callable[[np.ndarray, int], Any]


def main() -> None:
    """Print the table."""
    import torch

    ours, peers = programs()
    rng = np.random.default_rng(0)
    vocab = ours.config.vocab_size
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(ours))
    table = Table(
        title=f"greedy decoding, {NEW} tokens, {jnp.dtype(ours.dtype)}, "
        f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} threads, median of {ROUNDS}"
    )
    for column in (
        "",
        "batch",
        "tokens/s",
        "/ faster HF",
        "of bandwidth",
        "first token",
        f"prefill {PREFILL}",
    ):
        table.add_column(column, justify="right" if column else "left")
    for batch in BATCHES:
        ids = rng.integers(3, vocab, (batch, PROMPT))
        long = rng.integers(3, vocab, (batch, PREFILL))
        runs: dict[tuple[str, str], Callable[[], Any]] = {("", "read"): reader(size)}
        for name, generate in peers.items():
            runs[name, "first"] = partial(generate, ids, 1)
            runs[name, "all"] = partial(generate, ids, NEW)
            if batch == 1:
                runs[name, "prefill"] = partial(generate, long, 1)
        seconds = median_seconds(runs)
        read = seconds["", "read"] / PASSES
        steps = {
            name: (seconds[name, "all"] - seconds[name, "first"]) / (NEW - 1) for name in peers
        }
        best = min(step for name, step in steps.items() if name != "ours")
        for name, step in steps.items():
            prefill = seconds.get((name, "prefill"))
            table.add_row(
                name,
                str(batch),
                f"{batch / step:.1f}",
                f"{best / step:.2f}",
                f"{read / step:.0%}" if batch == 1 else "",
                f"{seconds[name, 'first']:.3f} s",
                f"{prefill:.2f} s" if prefill else "",
            )
        table.add_section()
    console = formatting.console(width=110)
    console.print(table)
    console.print(f"read bandwidth {size / read / 1e9:.1f} GB/s, weights {size / 1e6:.0f} MB")


def programs() -> tuple[LlamaForCausalLM, dict[str, Generate]]:
    """Our model, and every program by its name in the table."""
    import torch
    import transformers

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu:
        from flax import nnx

        config = PRESETS["llama-3.2-1b"]
        ours = LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        settings = transformers.LlamaConfig(**config.to_dict())
        theirs = transformers.LlamaForCausalLM(settings).to("cuda", torch.bfloat16).eval()
    else:
        with real_checkpoint() as directory:
            ours = LlamaForCausalLM.from_pretrained(directory, dtype=jnp.float32)
            load = transformers.LlamaForCausalLM.from_pretrained
            theirs = load(directory, dtype=torch.float32).eval()

    def run_ours(ids: np.ndarray, new: int) -> Any:
        return jax.block_until_ready(
            ours.generate(ids, max_new_tokens=new, eos_token_id=(), do_sample=False)
        )

    def run_theirs(cache: str | None, ids: np.ndarray, new: int) -> Any:
        rows = torch.from_numpy(ids).to(theirs.device)
        options = {} if cache is None else {"cache_implementation": cache}
        with torch.no_grad():
            out = theirs.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                # on a GPU a static cache brings torch.compile with it
                disable_compile=not on_gpu,
                **options,
            )
        return out.cpu()

    static = "HF, static cache" + (", torch.compile" if on_gpu else "")
    return ours, {
        "ours": run_ours,
        "HF, dynamic cache": partial(run_theirs, None),
        static: partial(run_theirs, "static"),
    }


def reader(size: int) -> Callable[[], Any]:
    """Reads `size` bytes PASSES times by torch's sum, on a CPU the fastest of what torch and XLA have."""
    import torch

    data = torch.ones(size // 4, device="cuda" if jax.default_backend() == "gpu" else "cpu")
    return lambda: [data.sum().item() for _ in range(PASSES)]


def median_seconds(runs: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Median seconds of each, after a round that compiles; alternating, so that drift affects all alike."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
