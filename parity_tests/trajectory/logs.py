"""Read the metrics of a training run: JSON, CSV, TensorBoard's event files, or what it printed."""

import csv
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
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
    "val_loss": "validation_loss",
    "lm loss": "loss",  # Megatron's
    "lm_loss": "loss",  # nanotron's
    "grad norm": "grad_norm",
    "learning rate": "learning_rate",
    "loss_metrics/global_avg_loss": "loss",  # torchtitan's
    "lr": "learning_rate",
    "iteration": "step",
    "iter": "step",
    "global_step": "step",
    "train/global_step": "step",
    "trainer/global_step": "step",
    "_step": "step",
}
_LIGHTNING = re.compile(r"lr-\w+|train_loss(_step)?|trainer/global_step")
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf)"
_STEP = re.compile(r"\b(?:step|iteration|iter)\b[ :=]*(\d+)")
_PAIR = re.compile(rf"\b([A-Za-z_]+(?: [a-z]+)*) *[:=] *({_NUMBER})(?=[\s,|;]|$)")
_JSON = re.compile(r"\s*(\{|\[\s*[{\]])")
_COLORS = re.compile(r"\x1b\[[\d;]*m")
_EVENTS = "*tfevents*"


class Log(NamedTuple):
    """metrics: name -> step -> value. Steps count from 1: a line has those that are done.

    means: metrics whose values are means over all steps since the line before.
    """

    path: Path
    metrics: dict[str, dict[int, float]]
    means: frozenset[str] = frozenset()

    @property
    def steps(self) -> list[int]:
        """The steps of any metric."""
        return sorted({step for values in self.metrics.values() for step in values})


def read_log(path: Path) -> Log:
    """The numbers in a log, or in that of a run's folder.

    MaxText and Lightning count steps from 0; 1 is added to those of a log with their names, evaluations
    included. Of several lines for a step the last counts, since a run that is resumed repeats steps.
    transformers' Trainer logs the mean loss of all steps since the last line.

    Raises:
        ValueError: no such file, none in the folder, or one without steps or numbers; the message says
            where.
    """
    file = _file_of(path)
    means: frozenset[str] = frozenset()
    if "tfevents" in file.name:
        read = _events
    elif file.suffix.lower() in (".csv", ".tsv"):
        read = _csv
    elif _is_printed(file):
        read = _printed
    elif (history := _history(file)) is not None:
        means = frozenset({"loss"})
        read = partial(_of_list, history)
    else:
        read = _json_lines
    lines = [(where, line) for where, line in read(file) if not _is_under_way(line)]
    present = {name for _, line in lines for name in line}
    is_lightning = any(map(_LIGHTNING.fullmatch, present)) and "loss" not in present
    first = int(is_lightning or any(name.startswith("learning/") for name in present))
    own = _NAMES | {"train_loss": "loss", "train_loss_step": "loss"} if is_lightning else _NAMES
    metrics: dict[str, dict[int, float]] = {}
    for where, line in lines:
        values = {
            _name(name, own): value for name, value in line.items() if value not in (None, "")
        }
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
    return Log(path, metrics, means)


def _name(name: str, names: Mapping[str, str]) -> str:
    """Our name of a metric; W&B's tables have the run's before it."""
    name = name.rpartition(" - ")[2]
    if name.lower() in ("step", "global_step"):
        return "step"
    if re.fullmatch(r"lr-\w+", name):
        return "learning_rate"
    return names.get(name, name)


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


def _history(file: Path) -> list[Any] | None:
    """The lines of transformers' trainer_state.json, or of a `log_history` alone; None for others."""
    text = _text(file)
    if not _JSON.match(text):
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None  # JSON lines, perhaps
    lines = content.get("log_history") if isinstance(content, dict) else content
    return lines if isinstance(lines, list) else None


def _of_list(lines: list[Any], file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        where = f"{file}, entry {number}"
        if not isinstance(line, dict):
            raise ValueError(f"{where}: found a {type(line).__name__}, expected an object")
        if "train_runtime" not in line:  # of the whole run
            yield where, line


def _is_printed(file: Path) -> bool:
    """Whether it is a text with lines such as "step: 10  loss: 3.21"."""
    return not _JSON.match(_text(file)) and any(True for _ in _printed(file))


def _printed(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Of torchtitan, Megatron, nanotron and others: lines with a step and `name: number`."""
    for number, text in enumerate(_COLORS.sub("", _text(file)).splitlines(), start=1):
        step = _STEP.search(text)
        pairs = dict(_PAIR.findall(text[step.end() :])) if step else {}
        if step and pairs:
            yield f"{file}, line {number}", pairs | {"step": step[1]}


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """Objects within a line are groups of metrics."""
    flat: dict[str, Any] = {}
    for name, value in line.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


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
        yield where, _flat(line)


def _csv(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    text = _text(file)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.DictReader(text.splitlines(), delimiter=delimiter)
    for row in rows:
        # rows that are longer than the header have a list under None, shorter ones None
        yield f"{file}, line {rows.line_num}", {k: v for k, v in row.items() if k and v is not None}


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(
            f"{file}: not UTF-8; expected JSON, CSV, an event file or printed lines"
        ) from None


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
