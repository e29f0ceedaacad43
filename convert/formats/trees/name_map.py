"""Maps of names: which arrays of a tree are which tensors of Hugging Face's, as a TOML file.

A file has a table `[[tensor]]` for each kind of tensor:

    array       regular expression of the array's path, all keys joined by "/"
    name        the tensor's name; {layer} stands for the group (?P<layer>...) of the expression, or for the
                index along layer_axis
    layer_axis  the axis along which an array without such a group has all layers, one after another
    shape       of the stored array without that axis; needed where its number of axes is not Hugging Face's
    reshape     the shape that the array is given first
    transpose   the order of its axes in Hugging Face's tensor, whose shape is what then results
    scale       what the array is multiplied by

Numbers may be written as expressions in the fields of config.json: "num_attention_heads * head_dim",
"sqrt(head_dim)". Of the whole file:

    title       name of the program, for people
    strip       regular expressions of what is removed from every path, such as the key of the parameters
    ignore      regular expressions of paths, before that, which are no weights: optimizer state, counters
    rope        the order of the rows of queries and keys: "halves" as Hugging Face has them, or "pairs" as
                Meta does; without it, it must be told for each conversion
"""

from __future__ import annotations

import ast
import math
import operator
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.config import LlamaConfig

ROPE_ORDERS = ("halves", "pairs")
_FIELD = re.compile(r"\{(\w*)\}")
DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


Number = int | float | str
"""A number, or an expression in the fields of config.json."""


class Place(NamedTuple):
    """What a rule makes of a path."""

    rule: Rule
    name: str
    """Of the tensor, in which {layer} may be left."""


@dataclass(frozen=True)
class Rule:
    """One kind of tensor; the fields are those of the file."""

    array: str
    name: str
    layer_axis: int | None = None
    shape: tuple[Number, ...] | None = None
    reshape: tuple[Number, ...] | None = None
    transpose: tuple[int, ...] | None = None
    scale: Number = 1

    def place(self, path: str) -> Place | None:
        """The tensor in the array at `path`; None if the rule is not for it."""
        match = re.fullmatch(self.array, path)
        if match is None:
            return None
        groups = {name: text for name, text in match.groupdict().items() if text is not None}
        return Place(self, _FIELD.sub(lambda field: groups.get(field[1], field[0]), self.name))

    def stored_shape(self, shape: tuple[int, ...], config: LlamaConfig) -> tuple[int, ...] | None:
        """The shape of an array, without its axis of layers, that becomes a tensor of `shape`.

        None where the rule does not tell, which leaves only the number of elements to be compared.
        """
        if self.shape is not None:
            return tuple(_integer(number, config) for number in self.shape)
        if self.reshape is not None or len(self.transpose or shape) != len(shape):
            return None
        order = self.transpose or tuple(range(len(shape)))
        return tuple(shape[order.index(axis)] for axis in range(len(shape)))

    def reshaped(self, shape: tuple[int, ...], config: LlamaConfig) -> tuple[int, ...]:
        """What an array of `shape` is given as its shape before it is transposed."""
        if self.reshape is None:
            return shape
        return tuple(_integer(number, config) for number in self.reshape)

    def factor(self, config: LlamaConfig) -> float:
        """What `scale` is for this model."""
        return float(evaluate(self.scale, config))


@dataclass(frozen=True)
class NameMap:
    """A map of names; the fields are those of the file."""

    tensor: tuple[Rule, ...]
    title: str = "Orbax"
    strip: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    rope: str | None = None

    def ignores(self, path: str) -> bool:
        """Whether the array at a path is no weight."""
        return any(re.fullmatch(pattern, path) for pattern in self.ignore)

    def place(self, path: str) -> Place | None:
        """The tensor in the array at a path, by the first rule that matches; None if none does."""
        for pattern in self.strip:
            path = re.sub(pattern, "", path)
        return next(filter(None, (rule.place(path) for rule in self.tensor)), None)


def evaluate(number: Number, config: LlamaConfig) -> float:
    """The value of a number or an expression.

    Raises:
        ValueError: not an expression of numbers, fields of config.json, + - * / and sqrt.

    >>> evaluate("sqrt(head_dim) / 2", LlamaConfig(head_dim=64))
    4.0
    """
    if not isinstance(number, str):
        return number
    try:
        value = _value(ast.parse(number.strip(), mode="eval").body, config)
    except (SyntaxError, RecursionError, MemoryError, ZeroDivisionError, OverflowError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"found {number!r}, expected an expression of numbers, sqrt(), + - * / and "
            + ", ".join(DIMENSIONS)
        )
    return value


def _value(node: ast.expr, config: LlamaConfig) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name in DIMENSIONS:
            return int(getattr(config, name))
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _OPERATORS:
            return _OPERATORS[type(kind)](_value(left, config), _value(right, config))
        case ast.Call(func=ast.Name(id="sqrt"), args=[argument], keywords=[]):
            return math.sqrt(_value(argument, config))
    raise ValueError


def _integer(number: Number, config: LlamaConfig) -> int:
    value = evaluate(number, config)
    if value < 1 or value != int(value):
        raise ValueError(f"found {number!r}, which is {value:g}, expected a positive integer")
    return int(value)


def read_name_map(path: Path) -> NameMap:
    """The map in a TOML file.

    Raises:
        ValueError: a file that cannot be read, is not TOML, or has a mistake; the rule is named.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None
    try:
        _require_known(content, NameMap)
        rules = content.pop("tensor", None)
        if not isinstance(rules, list) or not rules:
            raise ValueError("has no table [[tensor]]")
        for key, kind in (("title", str), ("strip", list), ("ignore", list), ("rope", str)):
            if not isinstance(content.get(key, kind()), kind):
                expected = "a list of regular expressions" if kind is list else "a text"
                raise ValueError(f"{key}: found {content[key]!r}, expected {expected}")
        if content.get("rope", "pairs") not in ROPE_ORDERS:
            raise ValueError(f"rope: found {content['rope']!r}, expected halves or pairs")
        for key in ("strip", "ignore"):
            content[key] = tuple(_pattern(text) for text in content.get(key, ()))
        return NameMap(
            tuple(_rule(number, each) for number, each in enumerate(rules, 1)), **content
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _rule(number: int, table: Any) -> Rule:
    title = f"tensor {number}"
    try:
        if not isinstance(table, dict):
            raise ValueError(f"found {table!r}, expected a table")
        if isinstance(table.get("array"), str):
            title += f" ({table['array']})"
        _require_known(table, Rule)
        for key in ("array", "name"):
            if not isinstance(table.get(key), str):
                raise ValueError(f"{key}: found {table.get(key)!r}, expected a text")
        groups = set(re.compile(_pattern(table["array"])).groupindex)
        axis = table.get("layer_axis")
        if axis is not None and not (type(axis) is int and axis >= 0):
            raise ValueError(f"layer_axis: found {axis!r}, expected the number of an axis")
        known = groups | ({"layer"} if axis is not None else set())
        for field in _FIELD.findall(table["name"]):
            if field not in known:
                raise ValueError(
                    f"name: found {{{field}}}, expected a group (?P<{field}>...) in array"
                    + (", or a layer_axis" if field == "layer" else "")
                )
        if axis is not None and "{layer}" not in table["name"]:
            raise ValueError("name: has no {layer}, but there is a layer_axis")
        order = table.get("transpose")
        if order is not None and not (
            isinstance(order, list)
            and all(type(axis) is int for axis in order)
            and sorted(order) == list(range(len(order)))
        ):
            raise ValueError(f"transpose: found {order!r}, expected all axes, such as [1, 0]")
        for key in ("shape", "reshape"):
            if key in table and not isinstance(table[key], list):
                raise ValueError(f"{key}: found {table[key]!r}, expected a list")
            for each in table.get(key, ()):
                _require_number(key, each)
        _require_number("scale", table.get("scale", 1))
        axes = table.get("reshape", table.get("shape"))
        if order is not None and axes is not None and len(axes) != len(order):
            raise ValueError(f"transpose: found {order!r}, expected {len(axes)} axes")
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from None
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
    }
    return Rule(**values)


def _require_known(table: Mapping[str, Any], kind: type[NameMap | Rule]) -> None:
    known = [field.name for field in fields(kind)]
    for key in table:
        if key not in known:
            raise ValueError(f"found {key}, expected one of {', '.join(known)}")


def _require_number(key: str, value: Any) -> None:
    """Raise ValueError for what is neither a number nor an expression."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"found {value!r}, expected a number or an expression")
        if evaluate(value, LlamaConfig()) == 0:
            raise ValueError(f"found {value!r}, expected no zero")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _pattern(text: Any) -> str:
    try:
        re.compile(text)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"found {text!r}, expected a regular expression ({error})") from None
    return str(text)
