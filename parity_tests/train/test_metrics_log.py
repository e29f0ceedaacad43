"""metrics.jsonl: truncated lines, and lines of steps that will run again; the picture."""

from pathlib import Path

from train.monitoring.metrics_log import FILE, draw_loss, open_metrics, read_metrics, write_line


def test_a_truncated_line_and_later_steps_are_dropped(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with open_metrics(tmp_path, 0) as file:
        for step in range(1, 6):
            write_line(file, {"step": step, "loss": float(step)})
        write_line(file, {"step": 4, "validation_loss": 4.5})
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text + '{"step": 6, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 4]
    with open_metrics(tmp_path, 4) as file:
        write_line(file, {"step": 5, "loss": 50.0})
    assert read_metrics(tmp_path) == [
        *({"step": step, "loss": float(step)} for step in range(1, 5)),
        {"step": 4, "validation_loss": 4.5},
        {"step": 5, "loss": 50.0},
    ]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_line_is_flushed(tmp_path: Path) -> None:
    with open_metrics(tmp_path, 0) as file:
        write_line(file, {"step": 1})
        assert read_metrics(tmp_path) == [{"step": 1}]


def test_the_picture(tmp_path: Path) -> None:
    draw_loss(tmp_path)  # without metrics
    with open_metrics(tmp_path, 0) as file:
        write_line(file, {"step": 1, "loss": 2.0})
        write_line(file, {"step": 1, "validation_loss": 2.0})
    draw_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
