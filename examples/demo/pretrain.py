"""Second half of `make demo`: pretrain a tiny model, kill the run, resume it, export, verify and sample it.

It only calls `python -m train` and `python -m llama_jax`. The exit code is 0 if PyTorch computes the loss
that the run reported.
"""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import ast
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

from rich.syntax import Syntax

from llama_jax import formatting
from llama_jax.cli import program
from train.flags import parse_options
from train.monitoring.metrics_log import PICTURE, read_metrics
from train.options import RunOptions
from train.options_toml import flags_of

RUN, EXPORTED = Path("runs/demo"), Path("runs/demo-hf")
# chosen in a sweep, see docs/log.md
CONFIG, OPTIONS = (Path(__file__).with_name(name) for name in ("config.json", "options.toml"))
KILLED_AFTER = 420  # steps, so that the checkpoint before is complete
NEW_TOKENS = 120  # with the prompt as many as a row of the training data

console = formatting.console()


def main() -> int:
    """Run, kill, resume, export, sample."""
    for directory in (RUN, EXPORTED):
        shutil.rmtree(directory, ignore_errors=True)
    console.print(
        "\n6. pretraining from scratch on the source code of Python's standard library",
        style="bold",
    )
    begin = train(
        "run",
        *("--out", str(RUN), "--toml", str(OPTIONS), "--model.config", str(CONFIG)),
    )
    while begin.poll() is None and reached() < KILLED_AFTER:
        time.sleep(0.2)
    if begin.poll() is not None:
        return begin.returncode or 1  # it ended before it could be killed
    begin.send_signal(signal.SIGKILL)
    begin.wait()
    console.print(f"\n7. killed after step {reached()}; resumed from its checkpoint", style="bold")
    if train("resume", str(RUN)).wait():
        return 1
    losses = [line["loss"] for line in read_metrics(RUN) if "loss" in line]
    console.print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps, picture: {RUN / PICTURE}"
    )
    console.print("\n8. exported, and its loss in PyTorch", style="bold")
    if train("export", str(RUN), str(EXPORTED), "--verify").wait():
        return 1
    console.print("\n9. what it writes, the first sample drawn", style="bold")
    text = sample()
    console.print(Syntax(text, "python", background_color="default"))
    parsed, lines = parsed_lines(text), len(text.splitlines())
    console.print(f"Python's parser accepts the first {parsed} of {lines} lines")
    return 0


def demo_options() -> RunOptions:
    """The options of the run, for other programs."""
    options = parse_options(RunOptions(), flags_of(OPTIONS), OPTIONS)
    return replace(options, model=replace(options.model, config=CONFIG))


def train(*arguments: str) -> subprocess.Popen[bytes]:
    """`python -m train ...`, started."""
    return subprocess.Popen([sys.executable, "-m", "train", *arguments])


def sample() -> str:
    """The prompt of the run's samples and what the exported model makes of it, at their temperature."""
    options = demo_options().evaluation
    command = [sys.executable, "-m", "llama_jax", "generate", "--model", str(EXPORTED), "--json"]
    command += ["--prompt", options.sample_prompt, "--temperature", str(options.sample_temperature)]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--seed", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return options.sample_prompt + json.loads(done.stdout)["text"]


def parsed_lines(text: str) -> int:
    """How many lines from the first on are Python by themselves: the most that `ast.parse` accepts.

    >>> parsed_lines("x = 1\\nif x:\\n    y = 2\\n    z = (")
    3
    """
    lines = text.splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of escapes in strings
        for count in range(len(lines), 0, -1):
            try:
                ast.parse("\n".join(lines[:count]))
            except (SyntaxError, ValueError):
                continue
            return count
    return 0


def reached() -> int:
    """The last step in the run's metrics."""
    lines = read_metrics(RUN)
    return lines[-1]["step"] if lines else 0


if __name__ == "__main__":
    program.leave(program.run_program(main))
