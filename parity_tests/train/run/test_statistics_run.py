"""A run with statistics: what is recorded, where, that the run is the same; events; the page."""

from __future__ import annotations

import json
import math
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parity_tests.harness.browser import in_browser, needs_browser
from parity_tests.train.runs import Tiny, metrics_of, run_flags
from parity_tests.trajectory.logs import read_log
from train.__main__ import main
from train.monitoring.history import read_events
from train.monitoring.statistics_record import flat

LAYERS, HEADS = 2, 4
PICTURES = "loss", "progress", "activations", "gradient norm", "update ratio", "parameter norm"
STACKED = "model.layers.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def logged() -> list[tuple[int, dict[str, Any]]]:
    return []


@pytest.fixture(scope="module")
def run(
    tiny: Tiny,
    tmp_path_factory: pytest.TempPathFactory,
    logged: list[tuple[int, dict[str, Any]]],
) -> Path:
    """12 steps, with statistics of steps 5 and 10 and a stand-in for Weights & Biases."""
    session = SimpleNamespace(
        log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None
    )
    out = tmp_path_factory.mktemp("statistics") / "run"
    flags = run_flags(tiny, out, log__statistics_every=5, log__wandb="project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            sys.modules,
            "wandb",
            SimpleNamespace(init=lambda **_: session, __spec__=SimpleNamespace()),
        )
        assert main([*flags, "--log.tensorboard"]) == 0
    return out


def test_the_run_is_the_same(run: Path, finished: Path) -> None:
    lines = metrics_of(run)
    assert [line["step"] for line in lines if "statistics" in line] == [5, 10]
    assert [
        {name: value for name, value in line.items() if name != "statistics"} for line in lines
    ] == metrics_of(finished)


def test_the_record(run: Path) -> None:
    record = next(line["statistics"] for line in metrics_of(run) if "statistics" in line)
    grad_norm = next(line["grad_norm"] for line in metrics_of(run) if line["step"] == 5)
    for kind in ("gradient_norm", "update_norm", "parameter_norm", "update_ratio"):
        assert len(record[kind]) == 12, kind
        assert len(record[kind][STACKED]) == LAYERS
        assert isinstance(record[kind]["model.norm.weight"], float)
    squares = sum(value**2 for value in flat({"all": record["gradient_norm"]}).values())
    assert math.sqrt(squares) == pytest.approx(grad_norm, rel=1e-5)
    ratio = record["update_norm"][STACKED][1] / record["parameter_norm"][STACKED][1]
    assert record["update_ratio"][STACKED][1] == pytest.approx(ratio, rel=1e-5)
    assert [len(heads) for heads in record["attention_entropy"]] == [HEADS] * LAYERS
    for name in ("residual_rms", "residual_max", "logit_rms", "dead_units", "saturated_units"):
        assert len(record[name]) == LAYERS, name


def test_other_services_get_scalars(run: Path, logged: list[tuple[int, dict[str, Any]]]) -> None:
    record = next(line["statistics"] for line in metrics_of(run) if line.get("statistics"))
    expected = record["update_norm"][STACKED][1]
    name = f"statistics/update_norm/{STACKED}/1"
    assert next(metrics[name] for step, metrics in logged if step == 5) == expected
    assert not any(name in metrics for step, metrics in logged if step not in (5, 10))
    assert not any(isinstance(value, dict | list) for _, line in logged for value in line.values())
    board = read_log(run / "tensorboard").metrics
    assert board[name][5] == pytest.approx(expected, rel=1e-6)
    assert set(board[name]) == {5, 10}
    assert f"statistics/attention_entropy/{LAYERS - 1}/{HEADS - 1}" in board


class _Page(HTMLParser):
    """The tags of a page, and what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_else(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = _Page(text)
    assert page.tags.count("img") == len(PICTURES)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert sorted(path.name for path in (run / "statistics").iterdir()) == [
        f"{name}.png" for name in ("activations", "gradient_norm", "parameter_norm", "update_ratio")
    ]
    final = [line["validation_loss"] for line in metrics_of(run) if "validation_loss" in line][-1]
    assert f"<td>{final:.4f}</td>" in text
    assert "<td>log.statistics_every</td><td>5</td>" in text.replace("-", "_")
    assert "<td>hidden_size</td><td>32</td>" in text


def test_the_events(run: Path, tmp_path: Path) -> None:
    events = [(event["event"], event["step"]) for event in read_events(run)]
    saved = [("checkpoint", step) for step in (3, 6, 9, 12)]
    assert events == [("start", 0), ("first step", 1), *saved, ("end", 12)]
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with (copy / "events.jsonl").open("a") as file:
        file.write('{"event": "chec')  # of a crash
    shutil.rmtree(copy / "checkpoints" / "12")
    arguments = ["--log.wandb=None", "--log.no-tensorboard", "--log.statistics-every=0"]
    assert main(["resume", str(copy), *arguments]) == 0
    after = [(event["event"], event["step"]) for event in read_events(copy)]
    assert after == [*events, ("resume", 9), ("first step", 10), *saved[3:], ("end", 12)]
    # of steps that ran again, what the first run recorded is gone
    assert [line["step"] for line in metrics_of(copy) if "statistics" in line] == [5]


def test_a_run_that_fails_says_so(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = run_flags(tiny, tmp_path / "run", optimizer__learning_rate=1e38)
    assert main(flags) == 2
    *_, last = read_events(tmp_path / "run")
    assert (last["event"], last["step"]) == ("error", 1)
    assert "expected finite numbers" in last["detail"]
    assert "expected finite numbers" in capsys.readouterr().err
    # and it has a page, of what there is
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "expected finite numbers" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.browser
@needs_browser
def test_the_page_in_a_browser(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "elsewhere.html"
    assert main(["report", str(run), "--html", str(page)]) == 0
    pictures, rows = in_browser(page)
    assert pictures == len(PICTURES)
    assert rows > 60  # summary, evaluations, events, options, model


def test_names_are_text_in_the_page(run: Path, tmp_path: Path) -> None:
    """A folder, a sample or an event that looks like HTML."""
    copy = Path(shutil.copytree(run, tmp_path / "<b>&run", ignore=ignore_checkpoints))
    with (copy / "metrics.jsonl").open("a") as file:
        evaluation = {"step": 12, "validation_loss": 1.0, "sample": "<script>alert(1)</script>"}
        skipped = {"step": 11, "event": "skipped", "reason": ["<i>"]}
        file.writelines(json.dumps(line) + "\n" for line in (evaluation, skipped))
    assert main(["report", str(copy)]) == 0
    text = (copy / "report.html").read_text()
    assert {"script", "b", "i"}.isdisjoint(_Page(text).tags)
    assert "&lt;script&gt;" in text
    assert "skipped" in text


def ignore_checkpoints(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if name in ("checkpoints", "tensorboard")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", "line 1: not valid JSON"),
        ('{"step": 1}\n[2]\n', "line 2: expected an object with a number `step`"),
        ('{"loss": 2.0}\n', "line 1: expected an object with a number `step`"),
    ],
)
def test_a_damaged_log(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text("steps = 3\n")
    (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("not the folder of a run: it has no run.toml\n")
    assert main(["report", "s3://bucket/run"]) == 2
    assert "--html FILE" in capsys.readouterr().err
