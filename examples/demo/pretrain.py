"""Second half of `make demo`: pretrain a tiny model, kill the run, resume it, export and verify the model.

It only calls `python -m train`. The exit code is 0 if PyTorch computes the loss that the run reported.
"""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from llama_jax import formatting
from llama_jax.cli import program
from train.monitoring.metrics_log import PICTURE, read_metrics

RUN, EXPORTED = Path("runs/demo"), Path("runs/demo-hf")
STEPS, EVERY, KILLED_AFTER = 240, 60, 90

console = formatting.console()


def main() -> int:
    """Run, kill, resume, export."""
    for directory in (RUN, EXPORTED):
        shutil.rmtree(directory, ignore_errors=True)
    console.print(
        "\n6. pretraining from scratch on the source code of Python's standard library",
        style="bold",
    )
    begin = train(
        "run",
        *("--out", str(RUN), "--steps", str(STEPS)),
        *("--checkpoint.every", str(EVERY), "--evaluation.every", str(EVERY)),
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
    return train("export", str(RUN), str(EXPORTED), "--verify").wait()


def train(*arguments: str) -> subprocess.Popen[bytes]:
    """`python -m train ...`, started."""
    return subprocess.Popen([sys.executable, "-m", "train", *arguments])


def reached() -> int:
    """The last step in the run's metrics."""
    lines = read_metrics(RUN)
    return lines[-1]["step"] if lines else 0


if __name__ == "__main__":
    program.leave(program.run_program(main))
