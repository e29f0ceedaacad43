"""Where figures go besides metrics.jsonl: TensorBoard and Weights & Biases, each imported if asked for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from train.config import LogOptions

Logger = Callable[[dict[str, Any]], None]


@contextmanager
def open_loggers(options: LogOptions, run: Path) -> Iterator[list[Logger]]:
    """A function for each service asked for, which takes a line of metrics.jsonl.

    Raises:
        ValueError: a package that is not installed.
    """
    with ExitStack() as stack:
        loggers: list[Logger] = []
        if options.tensorboard:
            loggers.append(_tensorboard(run, stack))
        if options.wandb is not None:
            loggers.append(_wandb(run, options.wandb, stack))
        yield loggers


def _tensorboard(run: Path, stack: ExitStack) -> Logger:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "log.tensorboard: expected the package tensorboardX to be installed"
        ) from None
    writer = SummaryWriter(str(run / "tensorboard"))
    stack.callback(writer.close)

    def write(figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, figures["step"])

    return write


def _wandb(run: Path, project: str, stack: ExitStack) -> Logger:
    try:
        import wandb
    except ImportError:
        raise ValueError("log.wandb: expected the package wandb to be installed") from None
    session = wandb.init(project=project, name=run.name, dir=str(run), id=run.name, resume="allow")
    stack.callback(session.finish)
    return lambda figures: session.log(figures, step=figures["step"])
