"""Read the metrics of a training run: JSON lines, CSV or TensorBoard's event files."""

import csv
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.formatting import first_line

# other programs' names
_NAMES = {
    "learning/loss": "loss",
    "learning/grad_norm": "grad_norm",
    "learning/current_learning_rate": "learning_rate",
    "learning/z_loss": "z_loss",
    "evaluation/avg_loss": "validation_loss",
    "eval/avg_loss": "validation_loss",
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/learning_rate": "learning_rate",
    "eval/loss": "validation_loss",
    "eval_loss": "validation_loss",
    "lr": "learning_rate",
    "iteration": "step",
    "train/global_step": "step",
}
_EVENTS = "*tfevents*"


class Log(NamedTuple):
    """metrics: name -> step -> value. Steps count from 1: a line has those that are done."""

    path: Path
    metrics: dict[str, dict[int, float]]

    @property
    def steps(self) -> list[int]:
        """The steps of any metric."""
        return sorted({step for values in self.metrics.values() for step in values})


def read_log(path: Path) -> Log:
    """The numbers in a log, or in that of a run's folder.

    MaxText counts steps from 0; 1 is added to those of a log with its names, evaluations included. Of
    several lines for a step the last counts, since a run that is resumed repeats steps.

    Raises:
        ValueError: no such file, none in the folder, or one without steps or numbers; the message says
            where.
    """
    file = _file_of(path)
    if "tfevents" in file.name:
        read = _events
    elif file.suffix.lower() == ".csv":
        read = _csv
    else:
        read = _json_lines
    lines = [(where, line) for where, line in read(file) if not _is_under_way(line)]
    first = 1 if any(name.startswith("learning/") for _, line in lines for name in line) else 0
    metrics: dict[str, dict[int, float]] = {}
    for where, line in lines:
        values = {_NAMES.get(name, name): value for name, value in line.items()}
        step = _number(values.pop("step", None))
        if step is None or not step.is_integer():
            raise ValueError(
                f"{where}: has no step; found {', '.join(map(str, line)) or 'nothing'}"
            )
        for name, value in values.items():
            if (number := _number(value)) is not None:
                metrics.setdefault(name, {})[int(step) + first] = number
    if not metrics:
        raise ValueError(f"{file}: has no metrics")
    return Log(path, metrics)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: no such file or directory")
        return path
    if (path / "metrics.jsonl").is_file():
        return path / "metrics.jsonl"
    events = sorted(path.glob(_EVENTS))
    if len(events) != 1:
        raise ValueError(
            f"{path}: has no metrics.jsonl, and {len(events)} event files of TensorBoard, expected one: "
            "name a file"
        )
    return events[0]


def _is_under_way(line: Mapping[str, Any]) -> bool:
    """Whether it is MaxText's of an evaluation that goes on, whose step is the number of a batch."""
    time, total = (
        _number(line.get(f"eval/{name}")) for name in ("step_time_seconds", "total_loss")
    )
    return time is not None and total is None


def _number(value: Any) -> float | None:
    """The value as a number; None for text, such as the name of the run."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _json_lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    lines = _text(file).split("\n")
    # what follows the last newline may be half a line, of a run that goes on or was killed
    for number, text in enumerate(lines[:-1] if len(lines) > 1 else lines, start=1):
        if not text.strip():
            continue
        where = f"{file}, line {number}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(line, dict):
            raise ValueError(f"{where}: found a {type(line).__name__}, expected an object")
        yield where, line


def _csv(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = csv.DictReader(_text(file).splitlines())
    for row in rows:
        # rows that are longer than the header have a list under None, shorter ones None
        yield f"{file}, line {rows.line_num}", {k: v for k, v in row.items() if k and v is not None}


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8; expected JSON lines, CSV or an event file") from None


def _events(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The scalars of an event file: records of length, CRC, protocol buffer and CRC (TFRecord)."""
    try:
        from tensorboardX.proto.event_pb2 import Event
    except ImportError:
        raise ValueError(
            f"{file}: tensorboardX is needed to read it: pip install '.[tensorboard]'"
        ) from None
    for payload in _records(file):
        try:
            event = Event.FromString(payload)
        except Exception as error:  # protobuf's, which has several implementations
            raise ValueError(f"{file}: a damaged event file ({first_line(error)})") from None
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield str(file), {"step": event.step, value.tag: value.simple_value}


def _records(file: Path) -> Iterable[bytes]:
    content, at = file.read_bytes(), 0
    while at + 12 <= len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        if at + 16 + size > len(content):  # a record that is still being written
            return
        yield content[at + 12 : at + 12 + size]
        at += 16 + size


def relative_difference(one: float, other: float) -> float:
    """|one - other| relative to the larger; infinite if only one is finite.

    >>> relative_difference(2.0, 1.9), relative_difference(0.0, 0.0), relative_difference(1.0, math.nan)
    (0.050000000000000044, 0.0, inf)
    """
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))
