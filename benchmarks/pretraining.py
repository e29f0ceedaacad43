"""Validation loss after the same time: the demo's run, and nanochat's model with its defaults in torch.

Both read the same tokens, the source code of Python's standard library, and are evaluated on all of its
validation tokens. Ours trains as `make demo` does, and its time includes compilation; torch then trains for
the same time, not counting that of `torch.compile`. One after the other in one process, in float32.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import nanochat
from benchmarks.report import Report, show
from examples.demo.pretrain import demo_options
from train.data.placement import placed_batches
from train.data.sources import common_vocabulary, find_sources
from train.data.tokens import Source, Split
from train.data.windows import windows
from train.model.config import model_config
from train.model.evaluate import evaluate
from train.options import RunOptions
from train.program.build import initial_opt_state, initial_params, run_program


class Trained(NamedTuple):
    """What a program made of its time; loss is per token, of `num_tokens`."""

    name: str
    parameters: int
    steps: int
    tokens_per_step: int
    seconds: float
    processor_seconds: float
    loss: float
    num_tokens: int


def train_ours(options: RunOptions, sources: Sequence[Source]) -> tuple[Trained, int]:
    """The steps of the run, without checkpoints and logs; also returns the bytes of validation text."""
    vocabulary = common_vocabulary(sources)
    assert vocabulary.tokenizer is not None
    config = model_config(options.model, vocabulary, options.sequence_length)
    program = run_program(options, config, jax.devices()[:1])
    length, seed = options.sequence_length, options.seed
    data = _windows(sources, "train", length, config.vocab_size, seed)
    with jax.set_mesh(program.mesh):
        params = initial_params(program, seed)
        opt_state = initial_opt_state(program, params)
        begin, processor = time.perf_counter(), time.process_time()
        batches = placed_batches(program.batch, data)
        for _ in range(options.steps):
            params, opt_state, _ = program.step(params, opt_state, next(batches), None)
        jax.block_until_ready(params)
        seconds, processor = time.perf_counter() - begin, time.process_time() - processor
        batches.close()
        (result,) = evaluate(program, params, sources, vocabulary.tokenizer, limit=0)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = options.batch_size * length
    loss = result.loss, result.num_tokens
    return Trained(
        "ours", count, options.steps, tokens, seconds, processor, *loss
    ), result.num_bytes


def train_nanochat(options: RunOptions, sources: Sequence[Source], seconds: float) -> Trained:
    """nanochat's model, on other windows of the same tokens."""
    vocab_size = common_vocabulary(sources).vocab_size
    data = {
        split: _windows(sources, split, nanochat.SEQUENCE, vocab_size, options.seed)
        for split in ("train", "validation")
    }
    result = nanochat.train(_rows(data["train"]), vocab_size, seconds)
    loss = nanochat.validation_loss(result.model, _rows(data["validation"]))
    name = f"nanochat, torch {'compiled' if result.compiled else 'eager'}"
    return Trained(
        name,
        result.parameters,
        result.steps,
        nanochat.SEQUENCE,
        seconds,
        result.processor_seconds,
        *loss,
    )


def tabulate(programs: Sequence[Trained], num_bytes: int) -> Report:
    """Losses side by side, in nats per token and in bits per byte."""
    assert len({program.num_tokens for program in programs}) == 1
    rows = []
    for program in programs:
        bits = program.loss * program.num_tokens / (math.log(2) * num_bytes)
        rows.append(
            [
                program.name,
                f"{program.parameters / 1e6:.2f}M",
                f"{program.steps:,}",
                f"{program.steps * program.tokens_per_step / 1e6:.2f}M",
                f"{program.seconds:.0f}",
                f"{program.processor_seconds:.0f}",
                f"{program.loss:.3f}",
                f"{bits:.3f}",
            ]
        )
    return Report(
        f"pretraining on Python's standard library, {jax.devices()[0].device_kind}",
        (
            *("", "parameters", "steps", "tokens", "seconds", "processor seconds"),
            *("validation loss", "bits per byte"),
        ),
        rows,
        [f"{programs[0].num_tokens:,} validation tokens, {num_bytes:,} bytes of text"],
        [program._asdict() for program in programs],
    )


def _windows(
    sources: Sequence[Source], split: Split, length: int, vocab_size: int, seed: int
) -> Any:
    return windows(sources, split=split, sequence_length=length, vocab_size=vocab_size, seed=seed)


def _rows(data: Any) -> Iterator[nanochat.Rows]:
    """One window at a time, without end for training data."""
    for number in range(len(data)):
        window = data[number]
        yield window["input_ids"][None], window["labels"][None]


def main() -> None:
    """Print the table."""
    options = demo_options()
    sources = find_sources(options.data, options.tokens, None)
    ours, num_bytes = train_ours(options, sources)
    show(tabulate([ours, train_nanochat(options, sources, ours.seconds)], num_bytes))


if __name__ == "__main__":
    main()
