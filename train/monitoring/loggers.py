"""Where figures go besides metrics.jsonl: TensorBoard and Weights & Biases, each imported if asked for."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from train.options import LogOptions

Logger = Callable[[dict[str, Any]], None]


def require_loggers(options: LogOptions) -> None:
    """Raise ValueError for a service asked for whose package is not installed."""
    wanted = {"tensorboardX": options.tensorboard, "wandb": options.wandb is not None}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise ValueError(f"log: found no package {package}, expected it to be installed")


@contextmanager
def open_loggers(options: LogOptions, run: Path) -> Iterator[list[Logger]]:
    """A function for each service asked for, which takes a line of metrics.jsonl."""
    with ExitStack() as stack:
        loggers: list[Logger] = []
        if options.tensorboard:
            loggers.append(_tensorboard(run, stack))
        if options.wandb is not None:
            loggers.append(_wandb(run, options.wandb, stack))
        yield loggers


def _tensorboard(run: Path, stack: ExitStack) -> Logger:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"))
    stack.callback(writer.close)

    def write(figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, figures["step"])

    return write


def _wandb(run: Path, project: str, stack: ExitStack) -> Logger:
    import wandb

    session = wandb.init(project=project, name=run.name, dir=str(run), id=run.name, resume="allow")
    stack.callback(session.finish)
    return lambda figures: session.log(figures, step=figures["step"])
