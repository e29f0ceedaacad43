"""The data of a run that exists, and the windows that a run trains on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.text.companions import tokenizer_home
from train.data import identity
from train.data.sources import common_vocabulary, find_sources
from train.data.token_directory import TokenDirectory
from train.data.tokens import Source, Split
from train.data.windows import windows
from train.model.evaluate import require_labels
from train.options import RunOptions


def data_of_run(folder: Path, options: RunOptions) -> tuple[Sequence[Source], LlamaConfig]:
    """The sources of `options.data`, which are those that the run in `folder` began with, and its model.

    Raises:
        ValueError: data that is gone, changed, or does not fit the model.
    """
    sources = find_sources(options.data, options.tokens, tokenizer_home(folder))
    for source in sources:
        if isinstance(source, TokenDirectory) and not source.path.exists():
            raise ValueError(
                f"{source.path}: not found, expected the data of {folder}: restore it, or pass the "
                "path that it was moved to with --data"
            )
    vocabulary = common_vocabulary(sources)
    remedy = "restore it, or begin a new run with `python -m train run`"
    identity.require_identity(folder, sources, remedy)
    config = LlamaConfig.from_pretrained(folder)
    if vocabulary.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: found a model with vocab_size {config.vocab_size}, expected at least "
            f"{vocabulary.vocab_size}, the data's"
        )
    return sources, config


def training_windows(options: RunOptions, config: LlamaConfig, sources: Sequence[Source]) -> Any:
    """The training windows of all steps.

    Raises:
        ValueError: shards that are missing or not what their index says; no validation split, or none with
            labels, although the run evaluates.
    """
    splits: list[Split] = ["train"]
    if options.evaluation.every:
        splits.append("validation")
        for source in sources:
            source.require_validation()
    identity.require_intact(sources, splits)
    if options.evaluation.every:
        limit = options.evaluation.batches * options.batch_size
        for source in sources:
            require_labels(source, options.sequence_length, config.vocab_size, limit)
    return windows(
        sources,
        split="train",
        sequence_length=options.sequence_length,
        vocab_size=config.vocab_size,
        seed=options.seed,
    )
