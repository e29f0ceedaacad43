"""What a fault is: a change of the float64 oracle, and the steps in which it begins to show."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from parity_tests.traces.sections import Inputs

Config = Mapping[str, Any]
Weights = dict[str, Tensor]


class Steps(NamedTuple):
    """What a changed step may use: the config, the section's parameters by their names in it, and what
    later steps read of those so far (recorded values, where there are any), by their names in it."""

    fields: Config
    weights: Weights
    read: Mapping[str, Tensor]


def _same(value: Any) -> Any:
    return value


def _same_weights(weights: Weights, _: Config, __: Callable[[str], Tensor]) -> Weights:
    return weights


class Change(NamedTuple):
    """A change of the oracle, within one section of the model.

    Attributes:
        inputs: changes what the model is called with.
        fields: changes the config.
        weights: changes the section's parameters, by their names in the checkpoint; called with them, the
            config, and a function that reads any other of the checkpoint.
        functions: functions of `reference/oracle.py` by name -> function of the original that returns what
            replaces it.
        steps: names of steps in a section -> function of `Steps` and the right value.
        angles: layers rotate by the changed oracle's own angles, even where right ones were recorded.
        future: queries may see later keys.
    """

    inputs: Callable[[Inputs], Inputs] = _same
    fields: Callable[[Config], Config] = _same
    weights: Callable[[Weights, Config, Callable[[str], Tensor]], Weights] = _same_weights
    functions: Mapping[str, Callable[[Any], Any]] = {}
    steps: Mapping[str, Callable[[Steps, Tensor], Tensor]] = {}
    angles: bool = False
    future: bool = False


class Family(NamedTuple):
    """Changes by a positive number: values that other programs have, and the change of any value."""

    values: tuple[float, ...]
    change: Callable[[float], Change]


Variants = Iterable[tuple[Any, Change]]


class Fault(NamedTuple):
    """One mistake that ports of Llama have made.

    Attributes:
        name: short, for programs.
        words: for people; `{}` stands for the variant.
        begins: steps where it begins to show, by their names in a section; the first that is recorded.
        variants: the changes that are this mistake in a model, each with its name or number.
        family: changes by a number that is fitted if none of its known values explains a recording.
        rounds: it only rounds: a value may be rounded up here and down there.
        direction: "backward" for what leaves all values right.
        convention: no mistake, but another way to do what Llama's definition leaves open.
    """

    name: str
    words: str
    begins: tuple[str, ...]
    variants: Callable[[Config, Inputs], Variants]
    family: Callable[[Config], Family] | None = None
    rounds: bool = False
    direction: Literal["forward", "backward"] = "forward"
    convention: bool = False

    def hypotheses(self, fields: Config, inputs: Inputs) -> Iterator[tuple[str, Change]]:
        """Every change of known values, in words."""
        for value, change in self.variants(fields, inputs):
            yield self.describe(value), change
        if self.family is not None:
            family = self.family(fields)
            for number in family.values:
                yield self.describe(number), family.change(number)

    def describe(self, value: Any) -> str:
        """The mistake in words."""
        return self.words.format(f"{value:.6g}" if isinstance(value, float) else value)


def one(name: str, words: str, begins: tuple[str, ...], change: Change, **options: Any) -> Fault:
    """A fault of one variant."""
    return Fault(name, words, begins, lambda _, __: [("", change)], **options)


def several(
    name: str, words: str, begins: tuple[str, ...], changes: Mapping[str, Change], **options: Any
) -> Fault:
    """A fault of some variants, whatever the model is."""
    return Fault(name, words, begins, lambda _, __: changes.items(), **options)


def of_number(
    name: str,
    words: str,
    begins: tuple[str, ...],
    values: Callable[[Config], Iterable[float]],
    change: Callable[[float], Change],
    **options: Any,
) -> Fault:
    """A fault with a number, which is fitted if it is none of `values`."""

    def family(fields: Config) -> Family:
        return Family(tuple(float(v) for v in dict.fromkeys(values(fields))), change)

    return Fault(name, words, begins, lambda _, __: (), family, **options)


def rounded_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounds to a dtype and stays in its own; so does its gradient."""
    return lambda x: x.to(dtype).to(x.dtype)


def in_halves(fault: Callable[[str, torch.dtype], Fault]) -> list[Fault]:
    """A fault that rounds, for each half precision, of its name and dtype."""
    return [fault("bfloat16", torch.bfloat16), fault("float16", torch.float16)]
