"""The report of one checkpoint, from its files to a verdict."""

import resource
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llama_jax.files.paths import source_path
from parity_tests.report.estimate import Estimate, estimate, model_bytes, total_memory
from parity_tests.report.measure.backward import backward
from parity_tests.report.measure.errors import compare
from parity_tests.report.measure.forward import forward
from parity_tests.report.measure.greedy import Greedy, greedy
from parity_tests.report.measure.metrics import Comparison, pooled
from parity_tests.report.measure.outputs import Outputs, outputs
from parity_tests.report.programs.checkpoint import open_checkpoint, require_same_shapes
from parity_tests.report.programs.jax_layers import JaxProgram
from parity_tests.report.programs.oracle_layers import OracleProgram
from parity_tests.report.programs.program import CanGenerate, MakeProgram, Program, Programs
from parity_tests.report.programs.tensors import torch_dtype
from parity_tests.report.programs.torch_layers import TorchProgram
from parity_tests.report.tokens import bundled_tokens, read_tokens
from parity_tests.report.verdict import Check, checks

DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
BACKWARD_LENGTH = 256  # tokens of the backward pass, which takes four times as long as the forward


class Report(NamedTuple):
    """`ours` is the program under test and `theirs` its baseline, both measured against the oracle.

    Args:
        title: the checkpoint.
        ours, theirs: names of the programs.
        eps: spacing of `dtype` at 1.
        length, backward_length: tokens of the forward and of the backward pass.
        modules: in forward order, then the logits and the loss.
        parameters: gradients in backward order; none without a backward pass.
        greedy: None where the model does not fit into memory, or a program cannot generate.
        seconds, peak: time, and bytes of the whole process.
    """

    title: str
    ours: str
    theirs: str
    dtype: str
    eps: float
    length: int
    backward_length: int
    modules: list[Comparison]
    outputs: Outputs
    parameters: list[Comparison]
    checks: list[Check]
    greedy: Greedy | None
    seconds: float
    peak: int

    @property
    def holds(self) -> bool:
        """Whether every error is within the tolerance."""
        return all(check.holds for check in self.checks)


def report(
    directory: Path,
    *,
    against: Path | None = None,
    tokens: Path | None = None,
    dtype: str = "fp32",
    with_backward: bool = False,
    console: Console | None = None,
    program: MakeProgram = JaxProgram,
) -> Report:
    """Compare a program with transformers on the checkpoint in `directory`.

    With `against`, compare the program on that directory with itself on the first. The reference is the
    float64 oracle on the weights of `directory`, rounded to `dtype`.

    Args:
        directory: or a name on the Hub, as is `against`.
        against: another checkpoint of the same shapes.
        tokens: a file of token ids; default: a text in this repository.
        dtype: of weights and computation, `fp32` or `bf16`.
        with_backward: compare gradients too.
        console: for the estimate and the progress; default: silent.
        program: a class with the methods of `Program`; default: llama_jax's.

    Raises:
        ValueError: a directory that is no Llama or that transformers refuses, shapes that differ between
            the two, no tokenizer, or token ids that do not fit.
    """
    begin, console = time.perf_counter(), console or Console(quiet=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    checkpoint, compute = open_checkpoint(source_path(directory)), DTYPES[dtype]
    ours: Program
    theirs: Program
    if against is None:
        ours, theirs = program(checkpoint, compute), TorchProgram(checkpoint, compute)
        names = ours.name, theirs.name
    else:
        other = open_checkpoint(source_path(against))
        require_same_shapes(checkpoint, other)
        ours, theirs = program(other, compute), program(checkpoint, compute)
        names = str(against), str(directory)
    programs = Programs(ours, theirs, OracleProgram(checkpoint, compute))
    ids = bundled_tokens(checkpoint) if tokens is None else read_tokens(tokens, checkpoint)
    backward_ids = ids[:, :BACKWARD_LENGTH] if with_backward else ids[:, :0]
    length, backward_length = ids.shape[1], backward_ids.shape[1]
    config, eps = checkpoint.config, float(ml_dtypes.finfo(compute).eps)
    _print_estimate(console, estimate(config, length, backward_length, compute.itemsize))

    layers = config.num_hidden_layers
    with _progress(console) as progress:
        steps = layers + 1 + (2 * layers + 1 if with_backward else 0)
        task = progress.add_task("forward", total=steps)
        advance = partial(progress.advance, task)
        modules, hidden = forward(programs, ids, layers, eps, advance)
        progress.update(task, description="logits")
        out = outputs(programs, hidden, ids, eps)
        advance()
        modules = [*modules, out.logits, _loss(out, eps)]
        parameters = []
        if with_backward:
            progress.update(task, description="backward")
            backward_dtype = torch_dtype(compute)
            parameters = backward(programs, backward_ids, layers, backward_dtype, eps, advance)
    fits = model_bytes(config, compute.itemsize) <= total_memory() / 4
    tokens_in_common = None
    if fits and isinstance(ours, CanGenerate) and isinstance(theirs, CanGenerate):
        tokens_in_common = greedy(ours, theirs, ids)
    return Report(
        title=str(directory),
        ours=names[0],
        theirs=names[1],
        dtype=dtype,
        eps=eps,
        length=length,
        backward_length=backward_length,
        modules=modules,
        outputs=out,
        parameters=parameters,
        checks=checks(modules, out, parameters, eps),
        greedy=tokens_in_common,
        seconds=time.perf_counter() - begin,
        peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def _loss(out: Outputs, eps: float) -> Comparison:
    """The loss as the last module.

    It is one number, and the ratio of two single errors is chance. Their error is therefore taken to be the
    root mean square of the errors of their per-token losses, which bounds that of any mean of them.
    """
    exact = torch.tensor([out.oracle.loss], dtype=torch.float64)
    spread = pooled(out.theirs.losses - out.oracle.losses)
    ours = torch.tensor([out.ours.loss])
    return compare("loss", ours, exact + spread, exact, eps=eps, rows=1)


def _print_estimate(console: Console, cost: Estimate) -> None:
    console.print(
        f"estimate: {cost.seconds:.0f} s and {cost.bytes / 1e9:.1f} GB of memory, "
        "one layer at a time"
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
