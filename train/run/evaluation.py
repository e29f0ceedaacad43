"""An evaluation during a run: validation loss, a sample of text, the picture of the loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax.formatting import printable
from llama_jax.text.companions import RUN_TOKENIZER
from train.data.tokens import Source
from train.model.evaluate import Evaluation, evaluate, pooled, source_names
from train.model.sample import sample_text
from train.monitoring.display import Display
from train.monitoring.loggers import Recorder
from train.monitoring.metrics_log import draw_loss
from train.options import RunOptions
from train.program.build import Program, model_of


def evaluate_step(
    program: Program,
    params: Any,
    options: RunOptions,
    sources: Sequence[Source],
    folder: Path,
    step: int,
    *,
    display: Display,
    record: Recorder,
) -> None:
    """Evaluate the parameters after `step`; show and record the result."""
    tokenizer, limit = folder / RUN_TOKENIZER, options.evaluation.batches
    by_source = evaluate(program, params, sources, tokenizer, limit=limit)
    evaluation = pooled(by_source)
    metrics: dict[str, Any] = {
        "step": step,
        "validation_loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "validation_tokens": evaluation.num_tokens,
    }
    display.say(
        f"step {step}: validation loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}"
        f"{_bits(evaluation)}"
    )
    if len(sources) > 1:
        for name, part in zip(source_names(sources), by_source, strict=True):
            metrics[f"validation_loss/{name}"] = part.loss
            metrics[f"bits_per_byte/{name}"] = part.bits_per_byte
            display.say(f"  {printable(name)}: validation loss {part.loss:.4f}{_bits(part)}")
    sample_tokens = options.evaluation.sample_tokens
    # only where this process's devices hold the whole model, since it generates on its own
    if sample_tokens and jax.process_count() == 1:
        metrics["sample"] = sample_text(
            model_of(program, params),
            folder / RUN_TOKENIZER,
            options.evaluation.sample_prompt,
            sample_tokens,
            temperature=options.evaluation.sample_temperature,
        )
        display.say(f"sample: {metrics['sample']!r}")
    record(metrics)
    if jax.process_index() == 0:
        draw_loss(folder)


def _bits(evaluation: Evaluation) -> str:
    bits = evaluation.bits_per_byte
    return "" if bits is None else f", {bits:.4f} bits per byte"
