"""What a guard did, as lines of metrics.jsonl and of the terminal."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from train.program.step import Metrics

# of a step: where the rows of its batch come from, see `train.data.provenance`
BatchRows = Callable[[int], list[dict[str, Any]]]


def guard_event(
    step: int, metrics: Metrics, names: Sequence[str], *, clips: bool
) -> dict[str, Any] | None:
    """The event of a step that was left out or clipped; None if it was neither.

    Args:
        metrics: of the step, on the host, with the guard's decision.
        names: of the values that the guard watches, see `train.program.guard.value_names`.
    """
    decision = metrics.guard
    assert decision is not None
    if decision.non_finite:
        return {"step": step, "event": "skipped", "reason": ["not finite"]}
    outliers = [
        f"{name} above {float(bound):.6g}"
        for name, bound, outlier in zip(names, decision.bound, decision.outlier, strict=True)
        if outlier
    ]
    if not outliers:
        return None
    return {"step": step, "event": "clipped" if clips else "skipped", "reason": outliers}


def in_words(event: dict[str, Any], loss: float, grad_norm: float) -> str:
    """The event as a line for the terminal."""
    rows = ", ".join(f"{row['source']} window {row['window']}" for row in event["batch"][:3])
    more = f" and {len(event['batch']) - 3} more" if len(event["batch"]) > 3 else ""
    reasons = "; ".join(event["reason"][:3])
    return (
        f"step {event['step']}: {event['event']}: {reasons} (loss {loss:.4g}, gradient norm "
        f"{grad_norm:.4g}); its rows are {rows}{more}"
    )


def finite_or_none(value: float) -> float | None:
    """The number, or None, JSON's null, for one that JSON does not have."""
    return value if math.isfinite(value) else None
