"""What tokens that several texts begin with cost: continuations of one context, and the turns of a chat.

The real checkpoint in float32, warm, all alternating in one process.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.decode import ROUNDS, median_seconds
from benchmarks.real_checkpoint import real_checkpoint
from benchmarks.report import Report, show
from llama_jax import LlamaForCausalLM, PromptCache
from llama_jax.evaluation.scoring import loglikelihood

CONTEXT, CONTINUATION, COUNT = 400, 8, 16
TURN = 24  # tokens that a user says


def main() -> None:
    """Print the table."""
    with real_checkpoint() as directory:
        model = LlamaForCausalLM.from_pretrained(directory, dtype=jnp.float32)
    show(report(model, context=CONTEXT, count=COUNT))


def report(model: LlamaForCausalLM, *, context: int, count: int) -> Report:
    """The times, and what each takes of the one that it is compared with."""
    rng = np.random.default_rng(0)
    vocab = model.config.vocab_size
    before = rng.integers(3, vocab, context).tolist()
    pairs = [(before, rng.integers(3, vocab, CONTINUATION).tolist()) for _ in range(count)]
    turns = turns_of(model, before)
    runs: dict[str, Callable[[], Any]] = {
        "one": lambda: loglikelihood(model, pairs[:1]),
        "all": lambda: loglikelihood(model, pairs),
        "fresh": partial(first_token, model, [*before, *range(3, 3 + TURN)], None),
        "kept": lambda: next(turns),
    }
    seconds = median_seconds(runs, ROUNDS)
    names = {
        "one": f"score, {context} tokens and one continuation of {CONTINUATION}",
        "all": f"the same with {count} continuations",
        "fresh": f"chat, first token of a turn of {TURN} after {context} tokens, all run",
        "kept": "the same, with the cache of the turns before",
    }
    base = {"all": "one", "kept": "fresh"}
    ratios = {name: seconds[name] / seconds[other] for name, other in base.items()}
    rows = [
        [text, f"{seconds[name]:.3f} s", f"{ratios[name]:.2f}" if name in ratios else "1"]
        for name, text in names.items()
    ]
    title = f"texts that begin alike, {jnp.dtype(model.dtype)}, warm, median of {ROUNDS}"
    return Report(title, ("", "seconds", "ratio"), rows, [], [seconds | {"ratios": ratios}])


def turns_of(model: LlamaForCausalLM, before: list[int]) -> Iterator[int]:
    """The first token of a turn after `before`, again and again; each says something else."""
    kept = PromptCache()
    first_token(model, before, kept)
    for turn in range(1_000):
        yield first_token(model, [*before, *range(3 + turn, 3 + turn + TURN)], kept)


def first_token(model: LlamaForCausalLM, prompt: list[int], kept: PromptCache | None) -> int:
    stream = model.stream(
        jnp.asarray([prompt]),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=(),
        prompt_cache=kept,
    )
    return int(next(stream)[0])
