"""Files as other programs, other people and bad disks leave them: mutations of JSON and TOML."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Path = tuple[Any, ...]

SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.5, 0.0, 1e308, float("inf"), float("nan"), 10**6,
    2**31, 2**63, 10**12, 10**30, "", " ", "x", "0", "null", "é", "\x00", "\ud800", "[/b]", "a\nb",
    "x" * 10_000, "<s>", "</s>", "../../etc/passwd", "/dev/zero",
]  # fmt: skip
NESTED: list[Any] = [
    [], {}, [None], [[]], [{}], {"": None}, {"a": {"b": {"c": []}}}, [1, "x", None], ["x"], [0, 1, 2],
    {"content": None}, {"content": "<s>"}, {"type": None}, {"type": "x"}, [["a", "b"]], list(range(300)),
]  # fmt: skip


def mutated(content: bytes, rng: random.Random, dump: Callable[[Any], bytes], parsed: Any) -> bytes:
    """One mutation of a file: of its bytes, or of the value `parsed` that `dump` writes."""
    if rng.random() < 0.2:
        return _bytes(content, rng)
    value = copy.deepcopy(parsed)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _value(value, rng)
    return dump(value)


def dump_json(value: Any) -> bytes:
    """With NaN, Infinity and lone surrogates, as Python writes them."""
    return json.dumps(value).encode()


def _bytes(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    nested = b"[" * 100_000 + b"]" * 100_000
    return rng.choice(
        [
            b"",
            b" \n",
            b"\xef\xbb\xbf" + content,
            content.decode("utf-8", "replace").encode("utf-16"),
            content[:place],
            content[:place] + b"\xff\xfe" + content[place:],
            content[:place] + b"\x00" + content[place:],
            content + content,
            content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :],
            nested,
            b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
            content.rstrip()[:-1] + b', "x": ' + nested + b"}",
            content.rstrip()[:-1] + b', "x": ' + b"9" * 10_000 + b"}",
            content.rstrip()[:-1] + b', "model_type": 3, "model_type": null}',
            *(json.dumps(value).encode() for value in (None, 3, "x", [], {}, [[]], [{}], True)),
        ]
    )


def _paths(value: Any, path: Path = (), depth: int = 6) -> list[Path]:
    """Of every node; of long lists and tables a few."""
    found = [path]
    if depth and isinstance(value, dict):
        for key in list(value)[:60]:
            found += _paths(value[key], (*path, key), depth - 1)
    elif depth and isinstance(value, list):
        for place in range(min(len(value), 4)):
            found += _paths(value[place], (*path, place), depth - 1)
    return found


def _value(value: Any, rng: random.Random) -> Any:
    paths = _paths(value)
    # of all depths alike, or the longest list would take nearly every mutation
    depth = rng.choice(sorted({len(path) for path in paths}))
    path = rng.choice([path for path in paths if len(path) == depth])
    if not path:
        return _other(value, rng)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    last = path[-1]
    match rng.randrange(6):
        case 0:
            del holder[last]
        case 1 if isinstance(holder, dict):
            holder[f"{last}_"] = holder.pop(last)
        case 2 if isinstance(holder, dict):
            holder["unknown"] = _other(holder[last], rng)
        case 2:
            holder.insert(last, holder[last])
        case _:
            holder[last] = _other(holder[last], rng)
    return value


def _other(value: Any, rng: random.Random) -> Any:
    """Another value, near to it or not."""
    near: list[Any] = [[value], {"x": value}, str(value)[:100]]
    if isinstance(value, int | float) and not isinstance(value, bool):
        near += [value + 1, -value, value * 2, value / 2, float(value), value * 10**6]
    if isinstance(value, str):
        near += [value.upper(), value + "x", value[:-1], [*value[:50]]]
    if isinstance(value, list):
        near += [value * 2, value[:1], value[::-1], dict(enumerate(value[:50]))]
    if isinstance(value, dict):
        near += [list(value)[:50], list(value.values())[:50], dict(list(value.items())[:1])]
    palette = rng.choice([near, SCALARS, SCALARS, NESTED])
    return copy.deepcopy(rng.choice(palette))
