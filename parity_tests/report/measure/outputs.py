"""The final outputs: logits, losses, distributions and top-1 tokens, at every position."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parity_tests.report.measure.errors import errors
from parity_tests.report.measure.metrics import Comparison, Errors
from parity_tests.report.programs.program import Programs

_BLOCK = 64  # positions whose logits are in memory at once
_SAMPLED = 4096  # tokens of the vocabulary, for the histograms
BINS = np.linspace(-12.0, 4.0, 97)  # of the histograms: log10 of |error| / rms of the row


class Predictions(NamedTuple):
    """What one program predicts at every position, beside the oracle.

    loss: as the program computes it. losses: of each position against its next token, from the logits,
    [T - 1]. kl: divergence of its distribution from the oracle's, nats, [T]. top1: the most likely token,
    [T]. max_error: the largest error of any logit. histogram: relative errors of a sample of the logits,
    by BINS.
    """

    loss: float
    losses: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    max_error: float
    histogram: np.ndarray


class Outputs(NamedTuple):
    """margin: by how much the oracle's largest logit exceeds its second largest, [T]."""

    logits: Comparison
    ours: Predictions
    theirs: Predictions
    oracle: Predictions
    margin: np.ndarray


def outputs(programs: Programs, hidden: Sequence[Tensor], ids: np.ndarray, eps: float) -> Outputs:
    """Compare the logits of all three programs' hidden states [1, T, H], a block of positions at a time."""
    targets = torch.from_numpy(ids)[0, 1:]
    blocks: list[list[dict[str, Any]]] = [[] for _ in programs]
    margins = []
    pairs = zip(programs, hidden, strict=True)
    logits_of_blocks = zip(*(program.logits(x, _BLOCK) for program, x in pairs), strict=True)
    for index, logits in enumerate(logits_of_blocks):
        reference = logits[-1]
        two = (
            reference.topk(2, dim=-1).values if reference.shape[-1] > 1 else reference.expand(-1, 2)
        )
        margins.append((two[:, 0] - two[:, 1]).numpy())
        next_tokens = targets[index * _BLOCK : (index + 1) * _BLOCK]
        log_reference = torch.log_softmax(reference, dim=-1)
        for values, of_program in zip(logits, blocks, strict=True):
            of_program.append(_block(values.double(), reference, log_reference, next_tokens, eps))
    predictions, logit_errors = [], []
    for program, x, of_program in zip(programs, hidden, blocks, strict=True):
        by_position = {
            name: np.concatenate([block[name] for block in of_program])
            for name in ("losses", "kl", "top1")
        }
        predictions.append(
            Predictions(
                loss=program.loss(x, ids),
                max_error=max(block["max_error"] for block in of_program),
                histogram=sum(block["histogram"] for block in of_program),
                **by_position,
            )
        )
        logit_errors.append(_joined([block["errors"] for block in of_program]))
    comparison = Comparison("lm_head", logit_errors[0], logit_errors[1], eps)
    ours, theirs, oracle = predictions
    return Outputs(comparison, ours, theirs, oracle, np.concatenate(margins))


def _block(
    logits: Tensor, reference: Tensor, log_reference: Tensor, next_tokens: Tensor, eps: float
) -> dict[str, Any]:
    log_probs = log_reference if logits is reference else torch.log_softmax(logits, dim=-1)
    difference = (logits - reference).abs()
    sample = slice(None, None, -(-reference.shape[1] // _SAMPLED))
    relative = difference[:, sample] / reference.square().mean(1, keepdim=True).sqrt()
    counts = torch.histc(
        relative[relative > 0].log10().clamp(BINS[0], BINS[-1]),
        bins=len(BINS) - 1,
        min=BINS[0],
        max=BINS[-1],
    )
    return {
        "errors": errors(logits, reference, eps, len(reference)),
        "losses": -log_probs[: len(next_tokens)].gather(1, next_tokens[:, None])[:, 0].numpy(),
        "kl": (log_reference.exp() * (log_reference - log_probs)).sum(1).numpy(),
        "top1": logits.argmax(1).numpy(),
        "max_error": float(difference.max()),
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


def ties(outputs: Outputs, eps: float) -> np.ndarray:
    """Positions where rounding decides the oracle's own top-1 token, bool [T].

    The oracle's rounding error is estimated as theirs, scaled to the spacing of float64: the same sums with
    smaller roundings.
    """
    return outputs.margin <= outputs.theirs.max_error * np.finfo(np.float64).eps / eps


def disagreements(outputs: Outputs, program: Predictions, eps: float) -> np.ndarray:
    """Positions where the program's top-1 token is not the oracle's, without ties."""
    return np.flatnonzero((program.top1 != outputs.oracle.top1) & ~ties(outputs, eps))
