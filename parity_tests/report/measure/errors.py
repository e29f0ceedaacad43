"""Errors of torch tensors against the oracle's."""

import torch
from torch import Tensor

from parity_tests.report.measure.metrics import Comparison, Errors, pooled

_BLOCK = 1 << 17  # elements whose errors are formed at once, in the processor's cache


def errors(values: Tensor, reference: Tensor, eps: float, rows: int) -> Errors:
    """Errors of `values`, in any dtype, against `reference`; both are reshaped to [rows, -1]."""
    if values.numel() != reference.numel():
        raise ValueError(f"shape {list(values.shape)}, expected {list(reference.shape)}")
    values, reference = values.reshape(rows, -1), reference.reshape(rows, -1)
    step = max(1, _BLOCK // reference.shape[1])
    blocks = zip(values.split(step), reference.split(step), strict=True)
    parts = zip(*(_row_errors(*block) for block in blocks), strict=True)
    scale, error, worst = map(torch.cat, parts)
    last_place = eps * torch.exp2(torch.floor(torch.log2(scale)))
    relative = _ratio(error, scale)
    return Errors(
        rms=pooled(relative.numpy()),
        max=float(_ratio(worst, scale).max()),
        ulps=pooled(_ratio(error, last_place).numpy()),
        max_ulps=float(_ratio(worst, last_place).max()),
        by_position=relative.float().numpy(),
    )


def _row_errors(values: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the rms of the reference, and the rms and the maximum of the difference."""
    reference = reference.double()
    difference = values.double() - reference
    scale = reference.shape[1] ** -0.5
    return (
        torch.linalg.vector_norm(reference, dim=1) * scale,
        torch.linalg.vector_norm(difference, dim=1) * scale,
        torch.linalg.vector_norm(difference, ord=torch.inf, dim=1),
    )


def compare(
    name: str, ours: Tensor, theirs: Tensor, reference: Tensor, *, eps: float, rows: int
) -> Comparison:
    """Both programs' tensor of that name against the oracle's, as `errors`."""
    of_ours, of_theirs = (errors(values, reference, eps, rows) for values in (ours, theirs))
    return Comparison(name, of_ours, of_theirs, eps)


def _ratio(error: Tensor, scale: Tensor) -> Tensor:
    """error / scale; 0 where both are 0."""
    return torch.where(error == 0, 0.0, error / scale)
