"""The whole report of one checkpoint, from its files to a verdict."""

import resource
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from parity_tests.report.backward import backward
from parity_tests.report.estimate import Estimate, estimate, model_bytes, total_memory
from parity_tests.report.forward import forward
from parity_tests.report.greedy import Greedy, greedy, our_continuation, torch_continuation
from parity_tests.report.metrics import Compared, compare, pooled
from parity_tests.report.outputs import Outputs, outputs
from parity_tests.report.programs import jax_layers, oracle_layers, torch_layers
from parity_tests.report.programs.checkpoint import Checkpoint, open_checkpoint, require_same_shapes
from parity_tests.report.programs.program import torch_dtype
from parity_tests.report.tokens import bundled_tokens, read_tokens
from parity_tests.report.verdict import Check, checks

DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
BACKWARD_LENGTH = 256  # the first tokens, for the backward pass, which takes four times as long


class Report(NamedTuple):
    """`ours` is the program in question and `theirs` its yardstick, both against the float64 oracle.

    modules in forward order, then the logits and the loss; parameters in backward order, none where the
    backward pass was not asked for. greedy: None where the model does not fit. seconds and peak (bytes,
    of the whole process) are what it took.
    """

    title: str
    ours: str
    theirs: str
    dtype: str
    unit: float
    length: int
    backward_length: int
    modules: list[Compared]
    outputs: Outputs
    parameters: list[Compared]
    checks: list[Check]
    greedy: Greedy | None
    seconds: float
    peak: int

    @property
    def holds(self) -> bool:
        """Whether the derived tolerance holds."""
        return all(check.holds for check in self.checks)


def report(
    directory: Path,
    *,
    against: Path | None,
    tokens: Path | None,
    dtype: str,
    with_backward: bool,
    console: Console,
) -> Report:
    """llama_jax beside transformers on `directory`; with `against`, llama_jax on that directory beside
    llama_jax on the first. The reference is the float64 oracle of the first, on its weights in `dtype`.

    Raises:
        ValueError: a directory that is no Llama or that transformers refuses, shapes that differ between
            the two, no tokenizer, or token ids that do not fit.
    """
    begin = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    checkpoint = open_checkpoint(directory)
    other = None if against is None else open_checkpoint(against)
    if other is not None:
        require_same_shapes(checkpoint, other)
    ids = bundled_tokens(checkpoint) if tokens is None else read_tokens(tokens, checkpoint)
    compute, length = DTYPES[dtype], ids.shape[1]
    first = ids[:, :BACKWARD_LENGTH] if with_backward else ids[:, :0]
    config, unit = checkpoint.config, float(ml_dtypes.finfo(compute).eps)
    _say_cost(console, estimate(config, length, first.shape[1], compute.itemsize))

    def programs(length: int) -> list[Any]:
        if other is None:
            pair = [
                jax_layers.program(checkpoint, compute, length),
                torch_layers.program(checkpoint, compute, length),
            ]
        else:
            pair = [
                jax_layers.program(each, compute, length)._replace(name=str(each.directory))
                for each in (other, checkpoint)
            ]
        return [*pair, oracle_layers.program(checkpoint, compute, length)]

    layers = config.num_hidden_layers
    with _progress(console) as progress:
        steps = layers + 1 + (2 * layers + 1 if with_backward else 0)
        task = progress.add_task("forward", total=steps)
        advance = partial(progress.advance, task)
        running = programs(length)
        passed = forward(running, ids, layers, unit, advance)
        progress.update(task, description="logits")
        said = outputs(running, passed.hidden, ids, unit)
        advance()
        modules = [*passed.modules, said.logits, _loss(said, unit)]
        del passed
        parameters = []
        if with_backward:
            progress.update(task, description="backward")
            parameters = backward(
                programs(first.shape[1]), first, layers, torch_dtype(compute), unit, advance
            )
    fits = model_bytes(config, compute.itemsize) <= total_memory() / 4
    return Report(
        title=str(directory),
        ours=running[0].name,
        theirs=running[1].name,
        dtype=dtype,
        unit=unit,
        length=length,
        backward_length=first.shape[1],
        modules=modules,
        outputs=said,
        parameters=parameters,
        checks=checks(modules, said, parameters, unit),
        greedy=_continuation(checkpoint, other, compute, ids) if fits else None,
        seconds=time.perf_counter() - begin,
        peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def _loss(said: Outputs, unit: float) -> Compared:
    """The loss as the last module.

    It is one number, and the ratio of two single errors is luck. The yardstick's error is taken to be that
    of its positions' losses, by root mean square, which bounds the error of any mean of them.
    """
    truth = torch.tensor([said.oracle.loss], dtype=torch.float64)
    spread = pooled(said.theirs.losses - said.oracle.losses)
    return compare("loss", torch.tensor([said.ours.loss]), truth + spread, truth, unit, 1)


def _continuation(
    checkpoint: Checkpoint, other: Checkpoint | None, dtype: Any, ids: np.ndarray
) -> Greedy:
    if other is None:
        ours = partial(our_continuation, checkpoint, dtype)
        return greedy(ours, partial(torch_continuation, checkpoint, dtype), ids)
    pair = (partial(our_continuation, each, dtype) for each in (other, checkpoint))
    return greedy(*pair, ids)


def _say_cost(console: Console, cost: Estimate) -> None:
    console.print(
        f"estimate: {cost.seconds:.0f} s and {cost.bytes / 1e9:.1f} GB of memory, "
        f"one layer at a time"
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
