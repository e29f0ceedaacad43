"""Whether muP's best learning rate is the same in every width: losses over learning rates, by width.

Tokens are the bytes of the standard library's top-level modules. The base is the narrowest width: two
layers, heads of 16, an MLP twice as wide. A trial's loss is the mean of its last tenth of steps, each on
text that it has not seen; trials of a seed see the same text in the same order in every width and at every
rate. The best rate is the one with the least mean over seeds, and, without a grid, the minimum of the
parabola through the means over the logarithm of the rate.

Trials are runs of `python -m train sweep`, to rounding: here the rate is part of the optimizer's state, so
that all trials of a width share a program. `sweep` compiles one for each rate.

python -m benchmarks transfer --widths 64 128 --seeds 0 1 2
"""

import math
import sysconfig
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.report import Report, show
from llama_jax import LlamaConfig
from llama_jax.cli.arguments import not_negative, number, positive, program_parser
from train.data.placement import placed_batches
from train.data.sources import find_sources
from train.data.tokenize import tokenize
from train.data.tokens import Source
from train.model.config import with_width
from train.options import EvaluationOptions, ModelOptions, OptimizerOptions, RunOptions
from train.program.build import initial_opt_state, initial_params, run_program
from train.run.training_data import training_windows

EOS = "<|endoftext|>"
BASE = LlamaConfig(
    vocab_size=257,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.1,
    rms_norm_eps=1e-5,
)
RATES = (4e-3, 5.66e-3, 8e-3, 1.13e-2, 1.6e-2)  # a grid with a factor of sqrt(2)


class RatedState(NamedTuple):
    """peak: the learning rate that updates are multiplied by, over that of the schedule. done: steps."""

    peak: Float[Array, ""]
    done: Int[Array, ""]
    inner: optax.OptState


def main(arguments: Sequence[str] | None = None) -> None:
    """Print each seed as it is done, and the means as a table."""
    parser = program_parser("python -m benchmarks transfer", "muP's best learning rate by width.")
    parser.add_argument("--widths", nargs="+", type=positive, default=[64, 128, 256, 512])
    parser.add_argument("--seeds", nargs="+", type=not_negative, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=number, default=RATES)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--steps", type=positive, default=150)
    values = parser.parse_args(arguments)
    options = RunOptions(
        steps=values.steps,
        sequence_length=64,
        model=ModelOptions(
            parametrization="mup",
            mup_base_hidden_size=BASE.hidden_size,
            mup_zero_head=True,
            compute_dtype="float32",
            remat="none",
        ),
        optimizer=OptimizerOptions(name=values.optimizer),
        evaluation=EvaluationOptions(every=0),
    )
    means = []
    with tempfile.TemporaryDirectory() as scratch:
        write_bytes(Path(scratch))
        sources = find_sources([scratch])
        for width in values.widths:
            config = with_width(BASE, width, "the base")
            all_losses = losses(options, config, sources, values.rates, values.seeds)
            for seed, line in zip(values.seeds, all_losses, strict=True):
                print(f"{width}, seed {seed}:", *(f"{loss:.4f}" for loss in line), flush=True)
            means.append(all_losses.mean(axis=0))
    show(tabulate(values.widths, values.rates, np.array(means)))


def write_bytes(directory: Path) -> None:
    """A token directory of the standard library's top-level modules, a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate([EOS, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch, "tokenizer.json")
        tokenizer.save(str(saved))
        tokenize(modules, saved, directory, eos=EOS, validation_fraction=0.02)


def losses(
    options: RunOptions,
    config: LlamaConfig,
    sources: Sequence[Source],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> Float[np.ndarray, "seeds rates"]:
    """The mean training loss of the last tenth of the steps; the options' learning rate is not used."""
    optimizer = replace(options.optimizer, learning_rate=1.0)
    shape = run_program(replace(options, optimizer=optimizer), config, jax.devices()[:1])
    program = run_program(
        options,
        config,
        jax.devices()[:1],
        learning_rate=lambda step: jnp.ones(()),
        wrap=lambda rule: rated(rule, shape.learning_rate),
    )
    results = []
    with jax.set_mesh(program.mesh):
        for seed in seeds:
            data = training_windows(replace(options, seed=seed), config, sources)
            with closing(placed_batches(program.batch, data)) as all_batches:
                batches = [next(all_batches) for _ in range(options.steps)]
            for rate in rates:
                params = initial_params(program, seed)
                state = initial_opt_state(program, params)
                state = state._replace(peak=jnp.asarray(rate, state.peak.dtype))
                measured = []
                for batch in batches:
                    params, state, metrics = program.step(params, state, batch, None)
                    measured.append(metrics.loss)
                last = measured[-max(options.steps // 10, 1) :]
                results.append(np.mean(jax.device_get(last)))
    return np.reshape(results, (len(seeds), len(rates)))


def rated(rule: Any, shape: Any) -> optax.GradientTransformationExtraArgs:
    """`rule`, whose learning rate is 1, with that of the state times `shape` of the step."""

    def init(params: Any) -> RatedState:
        return RatedState(jnp.zeros(()), jnp.zeros((), jnp.int32), rule.init(params))

    def update(
        updates: Any, state: RatedState, params: Any = None, **extra: Any
    ) -> tuple[Any, RatedState]:
        updates, inner = rule.update(updates, state.inner, params, **extra)
        rate = state.peak * shape(state.done)
        scaled = jax.tree.map(lambda leaf: leaf * rate.astype(leaf.dtype), updates)
        return scaled, RatedState(state.peak, state.done + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def minimum(rates: Sequence[float], means: Float[np.ndarray, " rates"]) -> float:
    """Where the least-squares parabola over log rate is least; NaN if it has no minimum.

    >>> round(minimum([1.0, 2.0, 4.0], np.array([1.0, 0.0, 1.0])), 6)
    2.0
    """
    if len(rates) < 3:
        return math.nan
    squared, linear, _ = np.polyfit(np.log(rates), means, 2)
    return math.exp(-linear / (2 * squared)) if squared > 0 else math.nan


def tabulate(
    widths: Sequence[int], rates: Sequence[float], means: Float[np.ndarray, "widths rates"]
) -> Report:
    """A row for each rate, the best of each column marked, and a row for the parabola's minimum."""
    best = means.argmin(axis=1)
    rows = []
    for row, rate in enumerate(rates):
        marks = [" *" if row == least else "" for least in best]
        cells = (f"{loss:.4f}{mark}" for loss, mark in zip(means[:, row], marks, strict=True))
        rows.append([f"{rate:.3g}", *cells])
    rows.append(["parabola's minimum", *(f"{minimum(rates, line):.3g}" for line in means)])
    return Report(
        "mean loss of the last tenth of the steps; * is the best of its column",
        ("", *map(str, widths)),
        rows,
        [],
        [
            {"width": width, "rate": rate, "loss": float(loss)}
            for width, line in zip(widths, means, strict=True)
            for rate, loss in zip(rates, line, strict=True)
        ],
    )
