"""Random mutations of JSON and TOML files: what other programs, people and bad disks leave."""

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
    """One mutation: of the bytes `content`, or of the value `parsed`, which `dump` then writes."""
    if rng.random() < 0.2:
        return _bytes(content, rng)
    value = copy.deepcopy(parsed)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _value(value, rng)
    return dump(value)


def dump_json(value: Any) -> bytes:
    """As Python writes it: also NaN, Infinity and lone surrogates."""
    return json.dumps(value).encode()


def _bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    nested = b"[" * 100_000 + b"]" * 100_000
    return rng.choice(
        [
            b"",
            b" \n",
            b"\xef\xbb\xbf" + content,
            content.decode("utf-8", "replace").encode("utf-16"),
            content[:at],
            content[:at] + b"\xff\xfe" + content[at:],
            content[:at] + b"\x00" + content[at:],
            content + content,
            content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
            nested,
            b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
            content.rstrip()[:-1] + b', "x": ' + nested + b"}",
            content.rstrip()[:-1] + b', "x": ' + b"9" * 10_000 + b"}",
            content.rstrip()[:-1] + b', "model_type": 3, "model_type": null}',
            *(json.dumps(value).encode() for value in (None, 3, "x", [], {}, [[]], [{}], True)),
        ]
    )


def _paths(value: Any, path: Path = (), depth: int = 6) -> list[Path]:
    """The paths of all nodes; of long lists and tables only of the first few."""
    paths = [path]
    if depth and isinstance(value, dict):
        for key in list(value)[:60]:
            paths += _paths(value[key], (*path, key), depth - 1)
    elif depth and isinstance(value, list):
        for index in range(min(len(value), 4)):
            paths += _paths(value[index], (*path, index), depth - 1)
    return paths


def _value(value: Any, rng: random.Random) -> Any:
    paths = _paths(value)
    # first a depth, then a path of that depth: the longest list would take nearly every mutation
    depth = rng.choice(sorted({len(path) for path in paths}))
    path = rng.choice([path for path in paths if len(path) == depth])
    if not path:
        return _other(value, rng)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    last = path[-1]
    match rng.randrange(6):
        case 0:
            del parent[last]
        case 1 if isinstance(parent, dict):
            parent[f"{last}_"] = parent.pop(last)
        case 2 if isinstance(parent, dict):
            parent["unknown"] = _other(parent[last], rng)
        case 2:
            parent.insert(last, parent[last])
        case _:
            parent[last] = _other(parent[last], rng)
    return value


def _other(value: Any, rng: random.Random) -> Any:
    """Another value: a similar one, or one of another kind."""
    similar: list[Any] = [[value], {"x": value}, str(value)[:100]]
    if isinstance(value, int | float) and not isinstance(value, bool):
        similar += [value + 1, -value, value * 2, value / 2, float(value), value * 10**6]
    if isinstance(value, str):
        similar += [value.upper(), value + "x", value[:-1], [*value[:50]]]
    if isinstance(value, list):
        similar += [value * 2, value[:1], value[::-1], dict(enumerate(value[:50]))]
    if isinstance(value, dict):
        similar += [list(value)[:50], list(value.values())[:50], dict(list(value.items())[:1])]
    palette = rng.choice([similar, SCALARS, SCALARS, NESTED])
    return copy.deepcopy(rng.choice(palette))
