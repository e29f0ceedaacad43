"""Task heads of the reference: projections of the decoder's output onto few classes, and their losses.

Written from the documentation of Hugging Face's classes and from the definitions of the losses. Like
`oracle.py` they compute in one dtype throughout; `test_task_heads.py` compares them with Hugging Face's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parity_tests.reference.oracle import IGNORE, Config, Weights, decode, linear


class HeadOutput(NamedTuple):
    """loss [] or None; logits [B, labels], [B, T, labels] or, of start and end, [B, T, 2]."""

    loss: Tensor | None
    logits: Tensor


def mean_cross_entropy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Mean of -log p(label) over the labels that are not `ignored`; 0 if there are none."""
    counts = labels != ignored
    log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
    chosen = log_probabilities.gather(-1, labels.where(counts, 0)[..., None])[..., 0]
    return -chosen.where(counts, 0.0).sum() / max(int(counts.sum()), 1)


def sequence_classification(
    config: Config,
    weights: Weights,
    *,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **inputs: Any,
) -> HeadOutput:
    """The head on the last token that is not padding; `problem_type` or the labels' dtype sets the loss."""
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    hidden = decode(config, weights, input_ids=input_ids, **inputs).hidden_states[-1]
    last = [hidden.shape[1] - 1] * len(hidden)
    if input_ids is not None and config.get("pad_token_id") is not None:
        for row, ids in enumerate(input_ids.tolist()):
            tokens = [i for i, token in enumerate(ids) if token != config["pad_token_id"]]
            last[row] = tokens[-1] if tokens else 0
    logits = linear(
        weights, "score", torch.stack([x[i] for x, i in zip(hidden, last, strict=True)])
    )
    if labels is None:
        return HeadOutput(None, logits)
    count = logits.shape[-1]
    problem = config.get("problem_type")
    if problem is None:
        of_dtype = "multi_label" if labels.is_floating_point() else "single_label"
        problem = "regression" if count == 1 else of_dtype
    if problem.startswith("single_label"):
        return HeadOutput(mean_cross_entropy(logits, labels.reshape(-1), IGNORE), logits)
    targets = labels.to(dtype).reshape(logits.shape)
    if problem == "regression":
        return HeadOutput(((logits - targets) ** 2).mean(), logits)
    yes, no = (torch.logaddexp(sign * logits, torch.zeros_like(logits)) for sign in (-1, 1))
    return HeadOutput((targets * yes + (1 - targets) * no).mean(), logits)


def token_classification(
    config: Config,
    weights: Weights,
    *,
    labels: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **inputs: Any,
) -> HeadOutput:
    """The head on every token; labels [B, T] are of the same token, not of the next."""
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    logits = linear(weights, "score", decode(config, weights, **inputs).hidden_states[-1])
    loss = None if labels is None else mean_cross_entropy(logits, labels, IGNORE)
    return HeadOutput(loss, logits)


def question_answering(
    config: Config,
    weights: Weights,
    *,
    start_positions: Tensor | None = None,
    end_positions: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **inputs: Any,
) -> HeadOutput:
    """Logits of the answer's start and end. Positions below 0 count as 0; past the end they are ignored."""
    weights = {
        name.replace("transformer.", "model.", 1): weight.to(dtype)
        for name, weight in weights.items()
    }
    logits = linear(weights, "qa_outputs", decode(config, weights, **inputs).hidden_states[-1])
    if start_positions is None or end_positions is None:
        return HeadOutput(None, logits)
    length = logits.shape[1]
    start_loss, end_loss = (
        mean_cross_entropy(logits[..., side], positions.reshape(-1).clamp(0, length), length)
        for side, positions in enumerate((start_positions, end_positions))
    )
    return HeadOutput((start_loss + end_loss) / 2, logits)
