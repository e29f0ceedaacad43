"""Mistakes at both ends of the model: embedding, head and loss."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity_tests.faults.change import (
    Change,
    Config,
    Fault,
    Steps,
    Variants,
    Weights,
    in_bfloat16,
    of_number,
    one,
    several,
)
from parity_tests.reference.oracle import IGNORE
from parity_tests.traces.sections import Inputs

EMBEDDED, LOGITS, LOSS = ("embed_tokens",), ("lm_head",), ("loss",)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _step(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return Change(steps={name: lambda _, value: change(value)})


def _ids(by: int) -> Change:
    def inputs(inputs: Inputs) -> Inputs:
        return inputs._replace(ids=np.maximum(inputs.ids + by, 0))

    return Change(inputs=inputs)


def _tied(weights: Weights, _: Config, read: Callable[[str], Tensor]) -> Weights:
    return weights | {_HEAD: read(_EMBEDDING)} if _HEAD in weights else weights


def _head_transposed(weights: Weights, *_: Any) -> Weights:
    return {name: w.T.reshape(w.shape) if w.ndim == 2 else w for name, w in weights.items()}


def _head_rolled(weights: Weights, *_: Any) -> Weights:
    return {name: w.roll(1, 0) if w.ndim == 2 else w for name, w in weights.items()}


def _head_reads_unnormed(steps: Steps, value: Tensor) -> Tensor:
    head = next(w for w in steps.weights.values() if w.ndim == 2)
    return (steps.read["x"] @ head.T).reshape(value.shape)


def _loss(change: Callable[[Any, Tensor, Tensor, Any], Tensor]) -> Change:
    """Another loss; called with the right one."""

    def replacement(right: Any) -> Any:
        return lambda logits, labels, count=None: change(right, logits, labels, count)

    return Change(functions={"causal_lm_loss": replacement})


def _targets(labels: Tensor) -> Tensor:
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:]


def _counted(change: Callable[[Tensor], Any]) -> Change:
    """The sum is divided by another number, a function of the labels."""
    return _loss(lambda right, logits, labels, _: right(logits, labels, change(labels)))


def _mean(logits: Tensor, targets: Tensor) -> Tensor:
    counts = targets != IGNORE
    chosen = torch.log_softmax(logits, dim=-1).gather(-1, targets.where(counts, 0)[..., None])
    return -chosen[..., 0].where(counts, 0.0).sum() / max(int(counts.sum()), 1)


def _twice_shifted(_: Any, logits: Tensor, labels: Tensor, __: Any) -> Tensor:
    return _mean(logits, _targets(_targets(labels)))


def _backwards(_: Any, logits: Tensor, labels: Tensor, __: Any) -> Tensor:
    return _mean(logits, torch.nn.functional.pad(labels, (1, 0), value=IGNORE)[:, :-1])


def _mean_of_means(right: Any, logits: Tensor, labels: Tensor, _: Any) -> Tensor:
    rows = [right(logits[i : i + 1], labels[i : i + 1], None) for i in range(len(labels))]
    return torch.stack(rows).mean()


def _with_z_loss(weight: float) -> Change:
    def loss(right: Any, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        counts = _targets(labels) != IGNORE
        squares = torch.logsumexp(logits, dim=-1).square().where(counts, 0.0)
        return right(logits, labels, count) + weight * squares.sum() / counts.sum()

    return _loss(loss)


def _smoothed(share: float) -> Change:
    def loss(right: Any, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        counts = _targets(labels) != IGNORE
        even = -torch.log_softmax(logits, dim=-1).mean(-1).where(counts, 0.0).sum() / counts.sum()
        return (1 - share) * right(logits, labels, count) + share * even

    return _loss(loss)


def _ignored_counted(right: Any, logits: Tensor, labels: Tensor, _: Any) -> Tensor:
    return right(logits, labels.where(labels != IGNORE, 0), None)


def _padded(fields: Config, _: Inputs) -> Variants:
    size = fields["vocab_size"]
    multiples = (2, 8, 16, 32, 64, 128, 256, 512, 1024)
    padded = {size + 1, *(size + -size % multiple for multiple in multiples)} - {size}
    for rows in sorted(padded):
        yield rows, _with_rows(rows - size)


def _with_rows(extra: int) -> Change:
    return _loss(
        lambda right, logits, labels, count: right(
            torch.nn.functional.pad(logits, (0, extra)), labels, count
        )
    )


def _padding_ignored(_: Config, inputs: Inputs) -> Variants:
    if inputs.attention_mask is not None:
        hidden = torch.from_numpy(inputs.attention_mask == 0)
        yield (
            "",
            _loss(
                lambda right, logits, labels, count: right(
                    logits, labels.masked_fill(hidden, IGNORE), count
                )
            ),
        )


FAULTS: list[Fault] = [
    of_number(
        "embedding_scale",
        "embeddings are multiplied by {}",
        EMBEDDED,
        lambda fields: (fields["hidden_size"] ** 0.5, fields["hidden_size"] ** -0.5, 12.0),
        lambda value: _step("embed_tokens", lambda x: x * value),
    ),
    several(
        "token_ids",
        "token ids are {}",
        EMBEDDED,
        {
            "one too large": _ids(1),
            "one too small": _ids(-1),
            "rolled by one position": Change(
                inputs=lambda i: i._replace(ids=np.roll(i.ids, 1, axis=1))
            ),
        },
    ),
    one(
        "embedding_bfloat16",
        "embeddings are in bfloat16",
        EMBEDDED,
        _step("embed_tokens", in_bfloat16),
        rounds=True,
    ),
    one("head_tied", "the head is the embedding, not lm_head", LOGITS, Change(weights=_tied)),
    one("head_transposed", "lm_head is transposed", LOGITS, Change(weights=_head_transposed)),
    one("head_rows", "rows of lm_head are off by one", LOGITS, Change(weights=_head_rolled)),
    one(
        "final_norm_dropped",
        "the head reads the last layer, not the final norm",
        LOGITS,
        Change(steps={"lm_head": _head_reads_unnormed}),
    ),
    of_number(
        "logits_scale",
        "logits are multiplied by {}",
        LOGITS,
        lambda fields: (fields["hidden_size"] ** -0.5, 1 / 8, 1 / 16, 0.5, 2.0),
        lambda value: _step("lm_head", lambda x: x * value),
    ),
    of_number(
        "logits_softcap",
        "logits are capped by tanh at {}",
        LOGITS,
        lambda _: (30.0, 50.0, 15.0, 20.0),
        lambda cap: _step("lm_head", lambda x: cap * torch.tanh(x / cap)),
    ),
    one(
        "logits_bfloat16",
        "logits are in bfloat16",
        LOGITS,
        _step("lm_head", in_bfloat16),
        rounds=True,
    ),
    one(
        "loss_without_shift",
        "labels are not shifted",
        LOSS,
        _loss(lambda _, logits, labels, __: _mean(logits, labels)),
    ),
    several(
        "loss_shift",
        "labels are shifted {}",
        LOSS,
        {"twice": _loss(_twice_shifted), "the wrong way": _loss(_backwards)},
    ),
    several(
        "mean_over_all_tokens",
        "the loss is divided by {}",
        LOSS,
        {
            "all tokens": _counted(lambda labels: labels.numel()),
            "all tokens but the last of each row": _counted(lambda labels: labels[:, 1:].numel()),
            "all labels that count, also the first of each row": _counted(
                lambda labels: int((labels != IGNORE).sum())
            ),
            "the rows of the batch": _counted(len),
            "nothing: it is a sum": _counted(lambda _: 1),
            "the length of the sequence": _counted(lambda labels: labels.shape[1]),
        },
    ),
    one(
        "mean_of_means",
        "the loss is the mean of the rows' means",
        LOSS,
        _loss(_mean_of_means),
    ),
    one("ignored_counted", "labels of -100 count, as token 0", LOSS, _loss(_ignored_counted)),
    Fault("padding_ignored", "labels of padding are ignored", LOSS, _padding_ignored),
    Fault("vocabulary_padded", "the loss is over a vocabulary padded to {}", LOSS, _padded),
    of_number(
        "z_loss",
        "the loss has a z-loss of weight {}",
        LOSS,
        lambda _: (1e-4, 1e-5, 1e-3, 2e-4),
        _with_z_loss,
    ),
    of_number(
        "label_smoothing",
        "labels are smoothed by {}",
        LOSS,
        lambda _: (0.1, 0.05, 0.01),
        _smoothed,
    ),
    one(
        "loss_bfloat16",
        "the loss is of logits in bfloat16",
        LOSS,
        _loss(lambda right, logits, *args: right(in_bfloat16(logits), *args)),
        rounds=True,
    ),
]
