"""First half of `make demo`: convert a real checkpoint, compare it with PyTorch, and generate text.

The exit code is 0 if the error against float64 is within the tolerance and both generate the same tokens, 1
if not, and 2 if the checkpoint cannot be downloaded.
"""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.table import Table

import convert
from llama_jax import LlamaForCausalLM, formatting, load_tokenizer
from llama_jax.cli import program
from llama_jax.files.json_object import read_json_object
from parity_tests.__main__ import main as parity_tests
from parity_tests.harness import demo_checkpoint
from parity_tests.harness.child_process import ROOT
from parity_tests.reference.errors import rms_error
from parity_tests.reference.oracle import oracle
from parity_tests.reference.tolerances import ROUNDING_RATIO

CONTEXT = 512  # tokens of a window of text on which logits are compared
WINDOWS = 4
NEW_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "Once upon a time, in a village by the sea,",
)

console = formatting.console()


def main() -> int:
    """Download, convert, compare, generate, report."""
    step("1. checkpoint")
    gguf = demo_checkpoint.fetch()
    console.print(f"{gguf.name}: {gguf.stat().st_size / 1e6:.0f} MB, sha256 verified")

    step("2. GGUF -> Hugging Face directory")
    directory = gguf.parent / "SmolLM2-135M-Instruct"
    shutil.rmtree(directory, ignore_errors=True)
    timed("converted", lambda: convert.convert(gguf, directory))

    step("3. the same weights in JAX and in PyTorch, float32")
    ours = timed("llama_jax loaded", lambda: LlamaForCausalLM.from_pretrained(directory))
    theirs = timed("transformers loaded", lambda: load_torch(directory))
    count = sum(leaf.size for leaf in jax.tree.leaves(ours))
    console.print(f"{count:,} parameters")

    tokenizer = load_tokenizer(directory)
    text = (ROOT / "LICENSE").read_text()
    ids = np.asarray(tokenizer.encode(text).ids[: WINDOWS * CONTEXT])
    windows = np.split(ids, WINDOWS)
    same = compare(ours, theirs, read_json_object(directory / "config.json"), windows)

    step(f"4. {NEW_TOKENS} greedy tokens from both")
    for prompt in PROMPTS:
        same = continue_both(ours, theirs, tokenizer, prompt) and same

    step("5. the parity report: every module and gradient")
    page = directory.parent / "parity.html"
    same = parity_tests(["report", str(directory), "--backward", "--html", str(page)]) == 0 and same

    verdict = "the same function" if same else "NOT the same function"
    console.print(f"\nllama_jax and PyTorch are {verdict} on this checkpoint.")
    console.print("Try it:")
    print(f"  .venv/bin/python -m llama_jax generate --model {directory} --prompt TEXT")
    return 0 if same else 1


def compare(
    ours: LlamaForCausalLM, theirs: Any, config: dict[str, Any], windows: list[np.ndarray]
) -> bool:
    """Print logit errors and losses against the float64 oracle; returns whether ours are within the bar.

    What counts is the geometric mean of the windows' ratios, since one window can be chance: trained models
    have tokens that multiply a rounding error by a hundred, and those after it attend to it.
    """
    forward = jax.jit(lambda model, ids: model(ids, labels=ids))
    weights = {name: value.double() for name, value in theirs.named_parameters()}
    table = Table(title=f"windows of {CONTEXT} tokens of real text against the float64 oracle")
    for column in ("loss", "oracle's", "rms logit error", "PyTorch's", "ratio", "same top-1"):
        table.add_column(column, justify="right")
    ratios = []
    for window in windows:
        tokens = torch.from_numpy(window[None])
        out = forward(ours, jnp.asarray(window[None], jnp.int32))
        with torch.no_grad():
            reference = theirs(tokens).logits.numpy()
            exact = oracle(config, weights, input_ids=tokens, labels=tokens)
        logits, truth = np.asarray(out.logits), exact.logits.numpy()
        errors = [rms_error([values], [truth]) for values in (logits, reference)]
        ratios.append(errors[0] / errors[1])
        table.add_row(
            *(f"{float(loss):.7f}" for loss in (out.loss, exact.loss)),
            *(f"{error:.2e}" for error in errors),
            f"{ratios[-1]:.2f}",
            f"{(logits.argmax(-1) == truth.argmax(-1)).mean():.2%}",
        )
    console.print(table)
    ratio = float(np.exp(np.mean(np.log(ratios))))
    console.print(f"our error is {ratio:.2f} x PyTorch's on average; {ROUNDING_RATIO} x is allowed")
    return ratio <= ROUNDING_RATIO


def continue_both(ours: LlamaForCausalLM, theirs: Any, tokenizer: Any, prompt: str) -> bool:
    """Print a greedy continuation and the speed of both; returns whether their tokens are identical."""
    ids = np.asarray([tokenizer.encode(prompt).ids])

    def by_jax() -> np.ndarray:
        return np.asarray(ours.generate(ids, max_new_tokens=NEW_TOKENS))

    def by_torch() -> np.ndarray:
        tokens = torch.from_numpy(ids)
        mask = torch.ones_like(tokens)
        with torch.no_grad():
            return theirs.generate(
                tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
            ).numpy()

    speeds = []
    results = []
    for run in (by_jax, by_torch):
        run()  # compilation and allocation are not speed
        begin = time.perf_counter()
        results.append(run())
        speeds.append((results[-1].shape[1] - ids.shape[1]) / (time.perf_counter() - begin))
    same = results[0].shape == results[1].shape and bool((results[0] == results[1]).all())
    console.print(tokenizer.decode(results[0][0].tolist()).strip(), style="italic")
    console.print(
        f"  tokens {'identical' if same else 'DIFFER'}; "
        f"llama_jax {speeds[0]:.1f} tokens/s, PyTorch {speeds[1]:.1f} tokens/s"
    )
    return same


def load_torch(directory: Path) -> Any:
    """The transformers model on the same directory, in float32."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def step(title: str) -> None:
    """A heading."""
    console.print(f"\n{title}", style="bold")


def timed(what: str, run: Callable[[], Any]) -> Any:
    """Run, print what was done and how long it took, return its value."""
    begin = time.perf_counter()
    value = run()
    console.print(f"{what} in {time.perf_counter() - begin:.1f} s")
    return value


if __name__ == "__main__":
    program.leave(program.run_program(main))
