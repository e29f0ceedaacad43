"""The windows that a run trains on, from data that has been checked."""

from collections.abc import Sequence
from typing import Any

from llama_jax.config import LlamaConfig
from train.data import identity
from train.data.tokens import Source, Split
from train.data.windows import windows
from train.options import RunOptions


def training_windows(options: RunOptions, config: LlamaConfig, sources: Sequence[Source]) -> Any:
    """The training windows of all steps.

    Raises:
        ValueError: shards that are missing or not what their index says; no validation split although
            the run evaluates.
    """
    splits: list[Split] = ["train"]
    if options.evaluation.every:
        splits.append("validation")
        for source in sources:
            source.require_validation()
    identity.require_intact(sources, splits)
    return windows(
        sources,
        split="train",
        sequence_length=options.sequence_length,
        vocab_size=config.vocab_size,
        seed=options.seed,
    )
