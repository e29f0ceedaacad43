"""The trials of a sweep: every combination of the values of some options."""

import difflib
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from train.flags import parse_options
from train.options import RunOptions
from train.options_toml import flags_of_value

TRIALS = "trials"
_NOT_SWEPT = ("out", "distributed.")


class Axis(NamedTuple):
    """An option, such as optimizer.learning-rate, and the texts of its values."""

    name: str
    values: tuple[str, ...]

    @property
    def label(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


class Trial(NamedTuple):
    """values: the text for each axis. options: of the run, whose `out` is its folder."""

    values: tuple[str, ...]
    options: RunOptions

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.options.out


def parse_grid(texts: Sequence[str]) -> list[Axis]:
    """The axes of NAME=VALUE,VALUE,... texts.

    Raises:
        ValueError: no text, an option that `train run` does not have, or no values, or one twice.

    >>> parse_grid(["optimizer.learning_rate=1e-3,2e-3"])
    [Axis(name='optimizer.learning-rate', values=('1e-3', '2e-3'))]
    """
    if not texts:
        raise ValueError(
            "grid: is empty; give options and values, such as --grid optimizer.learning-rate=1e-3,2e-3"
        )
    known = _values_by_name(RunOptions())
    axes: list[Axis] = []
    for text in texts:
        name, sign, rest = text.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        if not sign:
            raise ValueError(f"grid: found {text!r}, expected NAME=VALUE,VALUE,...")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0.4)
            suggestion = nearest[0] if nearest else "optimizer.learning-rate"
            raise ValueError(
                f"grid: found {name!r}, expected an option of `train run`, such as {suggestion}"
            )
        if name.startswith(_NOT_SWEPT):
            raise ValueError(f"grid: {name} is the same for all trials; choose another option")
        if name in [axis.name for axis in axes]:
            raise ValueError(f"grid: {name} is there twice; give all its values at once")
        values = tuple(part for value in rest.split(",") if (part := value.strip()))
        if not values:
            raise ValueError(f"grid: {name} has no values; give {name}=VALUE,VALUE,...")
        axes.append(Axis(name, values))
    return axes


def trials_of(axes: Sequence[Axis], options: RunOptions) -> list[Trial]:
    """A trial for every combination, the first axis changing last; folders are in `options.out`.

    Raises:
        ValueError: a value that the option cannot have, or two that are the same.
    """
    known = _values_by_name(RunOptions())
    for axis in axes:
        parsed = [
            _values_by_name(parse_options(options, _flags(axis.name, value, known), Path("grid")))
            for value in axis.values
        ]
        for index, one in enumerate(parsed):
            if one in parsed[:index]:
                raise ValueError(f"grid: {axis.name} has {axis.values[index]} twice")
    trials = []
    for values in itertools.product(*(axis.values for axis in axes)):
        flags = [
            flag
            for axis, value in zip(axes, values, strict=True)
            for flag in _flags(axis.name, value, known)
        ]
        swept = parse_options(options, flags, Path("grid"))
        folder = options.out / TRIALS / _name(axes, values)
        trials.append(Trial(values, replace(swept, out=folder)))
    return trials


def _flags(name: str, text: str, known: dict[str, Any]) -> list[str]:
    default, value = known[name], text
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"grid: {name}: found {text!r}, expected true or false")
        return flags_of_value(name, text == "true")
    return flags_of_value(name, text.split() if isinstance(default, tuple) else value)


def _name(axes: Sequence[Axis], values: Sequence[str]) -> str:
    """The name of a trial's folder, such as learning-rate=1e-3,width=64."""
    name = ",".join(f"{axis.label}={value}" for axis, value in zip(axes, values, strict=True))
    plain = re.sub(r"[^\w.=,+-]", "_", name)
    if plain == name and len(name) <= 100 and len({axis.label for axis in axes}) == len(axes):
        return name
    digest = hashlib.sha256(repr((axes_names(axes), values)).encode()).hexdigest()[:8]
    return f"{plain[:100]}-{digest}"


def axes_names(axes: Sequence[Axis]) -> list[str]:
    """The names of the options."""
    return [axis.name for axis in axes]


def _values_by_name(options: Any, prefix: str = "") -> dict[str, Any]:
    """The value of every option by its name on the command line."""
    values: dict[str, Any] = {}
    for field in fields(options):
        value, name = getattr(options, field.name), prefix + field.name.replace("_", "-")
        values |= _values_by_name(value, f"{name}.") if is_dataclass(value) else {name: value}
    return values
