"""A step's statistics as they are in metrics.jsonl, and as scalars for other services."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from train.program.statistics import Statistics


def statistics_record(statistics: Statistics) -> dict[str, Any]:
    """The statistics, of numpy arrays, as nested lists of numbers; None for one that is not finite.

    Returns:
        gradient_norm, update_norm, parameter_norm and update_ratio (update by parameter), each a dictionary
        of the parameters' names, with a list by layer where layers are stacked; and what
        `ActivationStatistics` has, each a list by layer, with attention_entropy by layer and sampled head.
    """
    norms, activations = statistics.norms, statistics.activations._asdict()
    record: dict[str, Any] = {
        f"{kind}_norm": {name: _numbers(getattr(norm, kind)) for name, norm in norms.items()}
        for kind in ("gradient", "update", "parameter")
    }
    with np.errstate(divide="ignore", invalid="ignore"):  # a bias may be 0
        record["update_ratio"] = {
            name: _numbers(np.divide(norm.update, norm.parameter)) for name, norm in norms.items()
        }
    activations["attention_entropy"] = activations.pop("entropy")
    return record | {name: _numbers(values) for name, values in activations.items()}


def flat(metrics: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without nesting: what is in it has names such as statistics/residual_rms/3.

    >>> flat({"step": 7, "statistics": {"residual_rms": [0.5, None], "update_norm": {"norm": 0.1}}})
    {'step': 7, 'statistics/residual_rms/0': 0.5, 'statistics/update_norm/norm': 0.1}
    """
    return {
        name: value
        for key, nested in metrics.items()
        for name, value in (
            _leaves(key, nested) if isinstance(nested, dict | list) else [(key, nested)]
        )
    }


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, nested in entries:
            yield from _leaves(f"{name}/{key}", nested)
    elif value is not None:
        yield name, value


def _numbers(values: Any) -> Any:
    """An array as nested lists."""
    if np.ndim(values):
        return [_numbers(value) for value in values]
    number = float(values)
    # as many digits as float32 has: they make up most of the file
    return float(f"{number:.8g}") if math.isfinite(number) else None
