"""What a run says about itself before its first step."""

from collections.abc import Sequence

import jax

from llama_jax.inspection.architecture import forward_flops_per_token, parameter_count
from train.data.tokens import Source
from train.monitoring.display import Display
from train.options import RunOptions
from train.program.build import Program
from train.program.mesh import in_words


def introduce(
    display: Display,
    program: Program,
    options: RunOptions,
    sources: Sequence[Source],
    start: int,
) -> None:
    """Say what is trained, on what, from which step, and how often the data will be read.

    Args:
        sources: of the training data.
        start: steps that are done already.
    """
    config, mesh = program.config, program.mesh
    display.say(
        f"{parameter_count(config):,} {options.model.parameter_dtype} parameters, computed in "
        f"{options.model.compute_dtype}; mesh {in_words(mesh.shape)} on {jax.devices()[0].device_kind}; "
        f"{options.batch_size} x {options.sequence_length} tokens a step"
    )
    flops = 3 * forward_flops_per_token(config, options.sequence_length)
    display.say(
        f"model FLOPs per token = 3 x (2 x matrix weights + 2 x layers x width x (seq + 1)) = {flops:.3g}"
    )
    if start >= options.steps:
        display.say(f"all {start} steps are done already; to add more: resume with --steps")
    elif start:
        display.say(f"resumed after step {start}")
    _introduce_data(display, options, sources)


def _introduce_data(display: Display, options: RunOptions, sources: Sequence[Source]) -> None:
    training_tokens = sum(len(source.open("train")) for source in sources)
    tokens_per_step = options.batch_size * options.sequence_length
    epochs = options.steps * tokens_per_step / training_tokens
    display.say(
        f"{training_tokens:,} training tokens; {options.steps} steps are {epochs:.3g} epochs"
    )
    if tokens_per_step > training_tokens:
        display.say(
            f"note: a single step reads {tokens_per_step:,} tokens, more than there are: it repeats them"
        )
