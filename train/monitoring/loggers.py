"""Where metrics go: metrics.jsonl, and TensorBoard and Weights & Biases if asked for."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from train.monitoring.metrics_log import open_metrics, write_line
from train.monitoring.statistics_record import flat
from train.options import LogOptions

# takes a line of metrics.jsonl
Recorder = Callable[[dict[str, Any]], None]


def require_loggers(options: LogOptions) -> None:
    """Raise ValueError for a service whose package is not installed."""
    packages = {
        "tensorboard": ("tensorboardX", options.tensorboard),
        "wandb": ("wandb", options.wandb is not None),
    }
    for extra, (package, enabled) in packages.items():
        if enabled and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"log.{extra}: {package} is not installed; in the checkout: pip install '.[{extra}]'"
            )


@contextmanager
def open_recorder(options: LogOptions, run: Path, start: int) -> Iterator[Recorder]:
    """A function that writes metrics everywhere they go; in processes but the first it does nothing.

    Args:
        run: its folder.
        start: steps that are done; lines of later ones, which will be run again, are removed.
    """
    if jax.process_index() != 0:
        yield lambda metrics: None
        return
    with ExitStack() as stack:
        file = stack.enter_context(open_metrics(run, start))
        recorders: list[Recorder] = [lambda metrics: write_line(file, metrics)]
        if options.tensorboard:
            recorders.append(_tensorboard(run, stack))
        if options.wandb is not None:
            recorders.append(_wandb(run, options.wandb, stack))

        def record(metrics: dict[str, Any]) -> None:
            # services plot series of numbers, which an event and its batch are not
            for recorder in recorders[:1] if "event" in metrics else recorders:
                recorder(metrics)

        yield record


def _tensorboard(run: Path, stack: ExitStack) -> Recorder:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"))
    stack.callback(writer.close)

    def record(metrics: dict[str, Any]) -> None:
        for name, value in flat(metrics).items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, metrics["step"])

    return record


def _wandb(run: Path, project: str, stack: ExitStack) -> Recorder:
    import wandb

    session = wandb.init(project=project, name=run.name, dir=str(run), id=run.name, resume="allow")
    stack.callback(session.finish)
    return lambda metrics: session.log(flat(metrics), step=metrics["step"])
