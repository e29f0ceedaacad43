"""Mistakes at both ends of the model: embedding, head and loss."""

import math
from collections.abc import Callable
from functools import partial
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
    in_halves,
    of_number,
    one,
    rounded_to,
    several,
)
from parity_tests.reference.oracle import IGNORE
from parity_tests.traces.sections import Inputs

EMBEDDED, LOGITS, LOSS = ("embed_tokens",), ("lm_head",), ("loss",)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _step(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return Change(steps={name: lambda _, value: change(value)})


def _other_ids(fields: Config, _: Inputs) -> Variants:
    last = fields["vocab_size"] - 1

    def ids(change: Callable[[np.ndarray], np.ndarray]) -> Change:
        return Change(inputs=lambda i: i._replace(ids=change(i.ids)))

    yield "one too large", ids(lambda i: np.minimum(i + 1, last))
    yield "one too small", ids(lambda i: np.maximum(i - 1, 0))
    yield "one too large, the last token is the first", ids(lambda i: np.where(i < last, i + 1, 0))
    yield "rolled by one position", ids(lambda i: np.roll(i, 1, axis=1))


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


def _flattened(_: Any, logits: Tensor, labels: Tensor, __: Any) -> Tensor:
    """All rows are one: the last logits of a row are for the first label of the next."""
    return _mean(logits.flatten(0, 1)[None, :-1], labels.flatten()[None, 1:])


def _rolled(_: Any, logits: Tensor, labels: Tensor, __: Any) -> Tensor:
    return _mean(logits, labels.roll(-1, 1))


def _of_parts(count: int) -> Change:
    """The mean of the means of parts of the sequence."""

    def loss(right: Any, logits: Tensor, labels: Tensor, _: Any) -> Tensor:
        parts = zip(logits.chunk(count, dim=1), _targets(labels).chunk(count, dim=1), strict=True)
        return torch.stack([_mean(own, targets) for own, targets in parts]).mean()

    return _loss(loss)


def _tokens_ignored(fields: Config, inputs: Inputs) -> Variants:
    """Labels of some tokens do not count."""

    def ignoring(token: int) -> Change:
        return _loss(
            lambda right, logits, labels, count: right(
                logits, labels.masked_fill(labels == token, IGNORE), count
            )
        )

    names: dict[int, str] = {0: "token 0"}
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        token = fields.get(name)
        if isinstance(token, int) and token >= 0:
            names[token] = f"token {token} ({name})"
    for token, words in names.items():
        if (inputs.targets == token).any():
            yield words, ignoring(token)
    segments = inputs.segment_ids
    if segments is not None:
        first = np.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        begins = torch.from_numpy(first)
        yield (
            "the first token of each document",
            _loss(
                lambda right, logits, labels, count: right(
                    logits, labels.masked_fill(begins, IGNORE), count
                )
            ),
        )


def _scaled(factor: float) -> Change:
    return _loss(lambda right, *args: factor * right(*args))


def _divided(count: float) -> Change:
    """The sum is divided by a number that a batch of this size cannot have."""
    return _loss(lambda right, logits, labels, _: right(logits, labels, 1) / count)


def _of_probabilities(right: Any, logits: Tensor, *rest: Any) -> Tensor:
    return right(torch.softmax(logits, dim=-1), *rest)


def _zeros_of(fields: Config, inputs: Inputs) -> Variants:
    pad = fields.get("pad_token_id")
    for token in {0, pad} if isinstance(pad, int) and pad >= 0 else {0}:
        hidden = torch.from_numpy(inputs.ids == token)[..., None]
        if hidden.any():
            yield token, _step("embed_tokens", partial(Tensor.masked_fill, mask=hidden, value=0.0))


def _mean_of_means(right: Any, logits: Tensor, labels: Tensor, _: Any) -> Tensor:
    rows = [right(logits[i : i + 1], labels[i : i + 1], None) for i in range(len(labels))]
    return torch.stack(rows).mean()


def _with_z_loss(weight: float) -> Change:
    def loss(right: Any, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        counts = _targets(labels) != IGNORE
        squares = torch.logsumexp(logits, dim=-1).square().where(counts, 0.0)
        return right(logits, labels, count) + weight * squares.sum() / counts.sum()

    return _loss(loss)


def _with_z_loss_of_all(weight: float) -> Change:
    def loss(right: Any, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        return right(logits, labels, count) + weight * logits.logsumexp(-1).square().mean()

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


def _embedding_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return one(
        f"embedding_{half}",
        f"embeddings are in {half}",
        EMBEDDED,
        _step("embed_tokens", narrow),
        rounds=True,
    )


def _logits_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return one(
        f"logits_{half}",
        f"logits are in {half}",
        LOGITS,
        _step("lm_head", narrow),
        rounds=True,
    )


def _loss_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)

    def all_of_it(_: Any, logits: Tensor, labels: Tensor, __: Any) -> Tensor:
        targets = _targets(labels).flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).to(dtype), targets).to(
            logits.dtype
        )

    return several(
        f"loss_{half}",
        f"{{}} in {half}",
        LOSS,
        {
            "the loss is of logits": _loss(
                lambda right, logits, *args: right(narrow(logits), *args)
            ),
            "the loss is": _loss(lambda right, *args: narrow(right(*args))),
            "logits and the loss are": _loss(
                lambda right, logits, *args: narrow(right(narrow(logits), *args))
            ),
            "log-probabilities and the loss are": _loss(all_of_it),
        },
        rounds=True,
    )


FAULTS: list[Fault] = [
    of_number(
        "embedding_scale",
        "embeddings are multiplied by {}",
        EMBEDDED,
        lambda fields: (fields["hidden_size"] ** 0.5, fields["hidden_size"] ** -0.5, 12.0),
        lambda value: _step("embed_tokens", lambda x: x * value),
    ),
    Fault("embedding_zeros", "the embedding of token {} is zero", EMBEDDED, _zeros_of),
    Fault("token_ids", "token ids are {}", EMBEDDED, _other_ids),
    *in_halves(_embedding_in),
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
    *in_halves(_logits_in),
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
        {
            "twice": _loss(_twice_shifted),
            "the wrong way": _loss(_backwards),
            "across rows: the last position of a row predicts the next row's first token": _loss(
                _flattened
            ),
            "around: the last position of a row predicts its first token": _loss(_rolled),
        },
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
    several(
        "mean_of_means",
        "the loss is the mean of the means of {}",
        LOSS,
        {
            "rows": _loss(_mean_of_means),
            **{f"{count} parts of the sequence": _of_parts(count) for count in (2, 4, 8)},
        },
    ),
    Fault("label_ignored", "labels that are {} do not count", LOSS, _tokens_ignored),
    one(
        "softmax_twice",
        "the loss is of probabilities in place of logits: the softmax is applied twice",
        LOSS,
        _loss(_of_probabilities),
    ),
    of_number(
        "loss_count",
        "the sum of the loss is divided by {}, not by the number of labels that count",
        LOSS,
        lambda fields: (1024.0, 2048.0, 4096.0, 8192.0, 65536.0, float(fields["vocab_size"])),
        _divided,
    ),
    of_number(
        "loss_scale",
        "the loss is multiplied by {}",
        LOSS,
        lambda _: (*(2.0**n for n in range(-7, 8) if n), 1 / math.log(2), math.log(2), 10.0, 0.1),
        _scaled,
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
        "z_loss_of_all",
        "the loss has a z-loss of weight {}, also of positions without a label",
        LOSS,
        lambda _: (1e-4, 1e-5, 1e-3, 2e-4),
        _with_z_loss_of_all,
    ),
    of_number(
        "label_smoothing",
        "labels are smoothed by {}",
        LOSS,
        lambda _: (0.1, 0.05, 0.01),
        _smoothed,
    ),
    *in_halves(_loss_in),
]
