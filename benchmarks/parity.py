"""Our logits' error against the float64 oracle beside transformers', float32 and bfloat16.

On the real checkpoint, and on every preset: its widths, heads, vocabulary and rotary embedding, but few
layers, random weights and random tokens. Presets of the same shape share a row, run as the last of them.
Presets that need more memory than this machine has, as the report estimates it, are skipped and named.

python -m benchmarks parity --presets llama-3.2-1b tinyllama-1.1b
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import transformers
from rich.table import Table

from benchmarks.random_checkpoint import write_random
from benchmarks.real_checkpoint import real_checkpoint
from llama_jax import PRESETS, LlamaConfig, formatting
from llama_jax.cli.arguments import Parser
from parity_tests.report.estimate import estimate, total_memory
from parity_tests.report.measure.errors import compare
from parity_tests.report.measure.forward import forward
from parity_tests.report.measure.metrics import Comparison
from parity_tests.report.programs.checkpoint import Checkpoint, open_checkpoint
from parity_tests.report.programs.jax_layers import JaxProgram
from parity_tests.report.programs.oracle_layers import OracleProgram
from parity_tests.report.programs.program import Programs
from parity_tests.report.programs.torch_layers import TorchProgram
from parity_tests.report.run import DTYPES
from parity_tests.report.tokens import bundled_tokens

LAYERS, TOKENS = 2, 64  # of a preset


def main(arguments: Sequence[str] = ()) -> None:
    """Print each row as it is measured, and all of them as a table."""
    parser = Parser(
        prog="python -m benchmarks parity", description="Compare our error with Hugging Face's."
    )
    parser.add_argument(
        "--presets",
        nargs="*",
        choices=PRESETS,
        default=list(PRESETS),
        metavar="NAME",
        help="presets to measure after the real checkpoint; default: all",
    )
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    console, skipped = formatting.console(width=110), []
    table = Table(
        title="rms logit error against the float64 oracle; "
        f"presets: {LAYERS} layers of random weights, {TOKENS} tokens",
        title_justify="left",
    )
    table.add_column("")
    for dtype in DTYPES:
        for column in ("ours", "HF", "ratio"):
            table.add_column(f"{dtype} {column}", justify="right")

    def add(name: str, checkpoint: Checkpoint, ids: np.ndarray) -> None:
        begin = time.perf_counter()
        cells = [cell for dtype in DTYPES for cell in _cells(logit_errors(checkpoint, ids, dtype))]
        table.add_row(name, *cells)
        console.print(name, *cells, f"{time.perf_counter() - begin:.0f} s")

    with real_checkpoint() as directory:
        checkpoint = open_checkpoint(directory)
        ids = bundled_tokens(checkpoint)
        add(f"SmolLM2-135M-Instruct, {ids.shape[1]} tokens", checkpoint, ids)
    table.add_section()
    for names in same_shapes(options.presets):
        config = replace(PRESETS[names[-1]], num_hidden_layers=LAYERS)
        needed = max(estimate(config, TOKENS, 0, dtype.itemsize).bytes for dtype in DTYPES.values())
        if needed > total_memory():
            skipped.append(f"{', '.join(names)} ({needed / 1e9:.0f} GB)")
            continue
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, TOKENS))
        with random_checkpoint(config) as checkpoint:
            add(", ".join(names), checkpoint, ids)
    console.print(table)
    if skipped:
        memory = f"{total_memory() / 1e9:.0f} GB"
        console.print(f"skipped, need more than this machine's {memory}: {'; '.join(skipped)}")


def logit_errors(checkpoint: Checkpoint, ids: np.ndarray, dtype: str) -> Comparison:
    """Errors of both programs' logits for `ids` [1, T], weights and computation in `dtype`."""
    compute, length = DTYPES[dtype], ids.shape[1]
    eps = float(ml_dtypes.finfo(compute).eps)
    programs = Programs(
        JaxProgram(checkpoint, compute),
        TorchProgram(checkpoint, compute),
        OracleProgram(checkpoint, compute),
    )
    layers = checkpoint.config.num_hidden_layers
    _, hidden = forward(programs, ids, layers, eps, lambda: None)
    # one head in memory at a time
    ours, theirs, exact = (
        next(program.logits(x, length)) for program, x in zip(programs, hidden, strict=True)
    )
    return compare("lm_head", ours, theirs, exact, eps=eps, rows=length)


def same_shapes(presets: Sequence[str]) -> list[list[str]]:
    """The presets' names, grouped by the shapes of their layers, embedding and head."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in presets:
        config = PRESETS[name]
        shape = (
            *(config.vocab_size, config.hidden_size, config.intermediate_size, config.head_size),
            *(config.num_attention_heads, config.kv_heads, config.tie_word_embeddings),
        )
        groups.setdefault(shape, []).append(name)
    return list(groups.values())


@contextmanager
def random_checkpoint(config: LlamaConfig) -> Iterator[Checkpoint]:
    """A checkpoint of random weights in a temporary directory."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        write_random(config, directory)
        yield open_checkpoint(directory)


def _cells(logits: Comparison) -> tuple[str, str, str]:
    ours, theirs = logits.ours.rms, logits.theirs.rms
    return f"{ours:.2e}", f"{theirs:.2e}", f"{ours / theirs:.2f}"
