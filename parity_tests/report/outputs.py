"""What comes out at the end: logits, losses, distributions and choices, of every position."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from parity_tests.report.metrics import Compared, Errors, errors
from parity_tests.report.programs.program import Program

_ROWS = 64  # positions whose logits are in memory at once
_SAMPLED = 4096  # tokens of the vocabulary, for the histograms
BINS = np.linspace(-12.0, 4.0, 97)  # of the histograms: log10 of |error| / rms of the row


class Predictions(NamedTuple):
    """What one program says of every position, beside the oracle.

    loss: its own. losses: of each position against its next token, from its logits, [T - 1]. kl: from the
    oracle's distribution to its, [T]. top1: the token it prefers, [T]. worst: its largest error of a logit.
    histogram: of a sample of its logits' relative errors, by BINS.
    """

    loss: float
    losses: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    worst: float
    histogram: np.ndarray


class Outputs(NamedTuple):
    """margin: by how much the oracle prefers its first token to its second, [T]."""

    logits: Compared
    ours: Predictions
    theirs: Predictions
    oracle: Predictions
    margin: np.ndarray


def outputs(
    programs: Sequence[Program], hidden: Sequence[Any], ids: np.ndarray, unit: float
) -> Outputs:
    """Of ours, theirs and the oracle, in this order; a block of positions at a time."""
    length = ids.shape[1]
    targets = torch.from_numpy(ids)[0, 1:]
    parts: list[list[dict[str, Any]]] = [[] for _ in programs]
    margins, heads = [], [program.head() for program in programs]
    for first in range(0, length, _ROWS):
        last = min(first + _ROWS, length)
        want = heads[-1](hidden[-1], first, last)
        best = want.topk(2, dim=-1).values if want.shape[-1] > 1 else want.expand(-1, 2)
        margins.append((best[:, 0] - best[:, 1]).numpy())
        truth = torch.log_softmax(want, dim=-1)
        for head, x, blocks in zip(heads, hidden, parts, strict=True):
            got = want if head is heads[-1] else head(x, first, last).double()
            blocks.append(_block(got, want, truth, targets[first:last], unit))
    del heads
    predictions, logits = [], []
    for program, x, blocks in zip(programs, hidden, parts, strict=True):
        joined = {
            name: np.concatenate([block[name] for block in blocks])
            for name in ("losses", "kl", "top1")
        }
        predictions.append(
            Predictions(
                loss=program.loss(x, ids),
                worst=max(block["worst"] for block in blocks),
                histogram=sum(block["histogram"] for block in blocks),
                **joined,
            )
        )
        logits.append(_joined([block["errors"] for block in blocks]))
    compared = Compared("lm_head", logits[0], logits[1], unit)
    return Outputs(compared, *predictions, margin=np.concatenate(margins))


def _block(
    got: torch.Tensor, want: torch.Tensor, truth: torch.Tensor, targets: torch.Tensor, unit: float
) -> dict[str, Any]:
    logs = truth if got is want else torch.log_softmax(got, dim=-1)
    difference = (got - want).abs()
    some = slice(None, None, -(-want.shape[1] // _SAMPLED))
    relative = difference[:, some] / want.square().mean(1, keepdim=True).sqrt()
    counts = torch.histc(
        relative[relative > 0].log10().clamp(BINS[0], BINS[-1]),
        bins=len(BINS) - 1,
        min=BINS[0],
        max=BINS[-1],
    )
    return {
        "errors": errors(got, want, unit, len(want)),
        "losses": -logs[: len(targets)].gather(1, targets[:, None])[:, 0].numpy(),
        "kl": (truth.exp() * (truth - logs)).sum(1).numpy(),
        "top1": got.argmax(1).numpy(),
        "worst": float(difference.max()),
        "histogram": counts.numpy(),
    }


def _joined(blocks: Sequence[Errors]) -> Errors:
    """The errors of rows that were compared in blocks."""
    rows = [len(block.by_position) for block in blocks]

    def over_rows(values: Sequence[float]) -> float:
        return float(np.sqrt(np.average(np.square(values), weights=rows)))

    return Errors(
        rms=over_rows([block.rms for block in blocks]),
        max=max(block.max for block in blocks),
        ulps=over_rows([block.ulps for block in blocks]),
        max_ulps=max(block.max_ulps for block in blocks),
        by_position=np.concatenate([block.by_position for block in blocks]),
    )


def ties(outputs: Outputs, unit: float) -> np.ndarray:
    """Positions where the oracle's choice is within the oracle's own error, bool [T].

    That error is the yardstick's, scaled to the spacing of float64: the same sums with smaller roundings.
    """
    return outputs.margin <= outputs.theirs.worst * np.finfo(np.float64).eps / unit


def disagreements(outputs: Outputs, one: Predictions, unit: float) -> np.ndarray:
    """Positions where it prefers another token than the oracle, ties left out."""
    return np.flatnonzero((one.top1 != outputs.oracle.top1) & ~ties(outputs, unit))
