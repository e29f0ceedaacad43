"""`python -m parity_tests report` and `mutate`: verdicts, files, and one line for each mistake."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import convert
from parity_tests.__main__ import main
from parity_tests.harness import demo_checkpoint
from parity_tests.harness.browser import in_browser, needs_browser
from parity_tests.harness.mutations import MUTATIONS, mutate
from parity_tests.report.measure.metrics import first_to_drift
from parity_tests.report.mutate import caught_by, quiet_report, write_case
from parity_tests.report.programs.torch_layers import TorchProgram

Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A small checkpoint without a tokenizer, and token ids for it."""
    return write_case(tmp_path_factory.mktemp("report"))


@pytest.fixture
def copy(files: Files, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to change."""
    return shutil.copytree(files[0], tmp_path / "copy")


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(files: Files, *options: str | Path) -> int:
    checkpoint, tokens = files
    return main(["report", str(checkpoint), "--tokens", str(tokens), *map(str, options)])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_within_tolerance_and_written_to_files(files: Files, dtype: str, tmp_path: Path) -> None:
    numbers, page = tmp_path / "report.json", tmp_path / "report.html"
    assert run(files, "--dtype", dtype, "--backward", "--json", numbers, "--html", page) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}
    saved = json.loads(numbers.read_text())
    assert saved["holds"]
    assert saved["first_module_to_drift"] is None
    assert [len(saved[key]) for key in ("modules", "parameters")] == [4 + 2 * 14 + 3, 2 * 9 + 3]
    assert saved["greedy"]["generated"] > 0
    if dtype == "fp32":
        assert saved["predictions"]["ours"]["top1_agreement"] == 1.0
        assert saved["greedy"]["identical"] == saved["greedy"]["generated"]
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 5
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "url(" not in text


def test_a_checkpoint_against_its_copy_and_a_changed_copy(
    files: Files, copy: Path, tmp_path: Path
) -> None:
    numbers = tmp_path / "report.json"
    assert run(files, "--against", copy, "--json", numbers) == 0
    saved = json.loads(numbers.read_text())
    assert all(module["ours"] == module["theirs"] for module in saved["modules"][:-1])
    assert saved["ours"] == str(copy)

    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.001
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert run(files, "--against", copy, "--json", numbers) == 1
    saved = json.loads(numbers.read_text())
    assert saved["first_module_to_drift"] == "layers.1.mlp.up_proj"


class SlightlyOff(TorchProgram):
    """A program of someone else's: transformers' with a small mistake in the final norm."""

    name = "slightly off"

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().norm(hidden) * 1.0001


def test_a_program_of_your_own(files: Files) -> None:
    for program, module in ((TorchProgram, None), (SlightlyOff, "norm")):
        result = quiet_report(*files, program=program)
        assert (result.ours, result.theirs) == (program.name, "PyTorch")
        assert first_to_drift(result.modules) == module
        assert result.holds == (module is None)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "mask_off_by_one" else pytest.mark.slow) for n in MUTATIONS],
)
def test_a_mutation_fails_the_report_which_names_the_module(files: Files, name: str) -> None:
    with mutate(name):
        caught = caught_by(quiet_report(*files))
    assert caught.metrics
    assert caught.module == MUTATIONS[name].begins_at


def test_no_such_directory(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "absent: no such directory" in error_line(capsys)


def test_wrong_architecture(files: Files, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(copy, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert run((copy, files[1])) == 2
    assert "model_type: found 'gpt2', expected 'llama'" in error_line(capsys)


def test_weights_of_another_model(
    files: Files, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"wte.weight": torch.zeros(3, 3)}, copy / "model.safetensors", {"format": "pt"})
    edit_config(copy, num_hidden_layers=1)
    assert run((copy, files[1])) == 2
    line = error_line(capsys)
    assert "model.embed_tokens.weight: missing" in line
    assert "wte.weight: unexpected" in line


def test_a_config_that_transformers_refuses(
    files: Files, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(copy, dtype="float17")
    assert run((copy, files[1])) == 2
    assert "transformers cannot load it" in error_line(capsys)


def test_two_checkpoints_of_different_shapes(
    files: Files, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(copy / "model.safetensors")
    for name in list(weights):
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weights[name] = weights[name][:40].clone()
        if name.endswith("down_proj.weight"):
            weights[name] = weights[name][:, :40].clone()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    edit_config(copy, intermediate_size=40)
    assert run(files, "--against", copy) == 2
    line = error_line(capsys)
    assert "6 tensors differ in shape" in line
    assert "model.layers.0.mlp.down_proj.weight: [32, 44] and [32, 40]" in line


def test_no_tokenizer(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(files[0])]) == 2
    line = error_line(capsys)
    assert "tokenizer.json: " in line
    assert "not found" in line
    assert "give token ids with --tokens FILE" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found 0 tokens, expected at least 2"),
        ("7", "found 1 tokens, expected at least 2"),
        ("1 2 61", "found token 61, expected 0 to 60"),
        ("1, -1", "found token -1, expected 0 to 60"),
        ("some text", "expected token ids, a .npy array or integers"),
    ],
)
def test_tokens_that_do_not_fit(
    files: Files, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens.txt"
    path.write_text(content)
    assert run((files[0], path)) == 2
    assert message in error_line(capsys)


def test_tokens_that_cannot_be_read(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run((files[0], tmp_path / "absent.txt")) == 2
    assert "absent.txt: cannot be read (No such file or directory)" in error_line(capsys)
    np.save(tmp_path / "floats.npy", np.ones(3))
    assert run((files[0], tmp_path / "floats.npy")) == 2
    assert "found float64, expected integers" in error_line(capsys)


def test_an_output_path_that_cannot_be_written_is_refused_at_once(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, "--html", tmp_path / "absent" / "report.html") == 2
    assert "absent: directory does not exist" in error_line(capsys)
    assert run(files, "--json", tmp_path) == 2
    assert f"{tmp_path}: is a directory, expected a file" in error_line(capsys)


def test_torch_is_not_installed(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "parity_tests.report.run", None)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.delitem(
        __import__("sys").modules, "parity_tests.report.output.files", raising=False
    )
    monkeypatch.delitem(__import__("sys").modules, "parity_tests.report.run", raising=False)
    assert run(files) == 2
    assert "torch is not installed; in the checkout: pip install '.[parity]'" in error_line(capsys)


@pytest.mark.browser
@needs_browser
def test_the_page_in_a_browser(files: Files, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert run(files, "--backward", "--html", page) == 0
    pictures, rows = in_browser(page)
    assert pictures == 5
    assert rows > 4 + 2 * 14 + 3 + 2 * 9 + 3


@pytest.mark.browser
@pytest.mark.checkpoint
@needs_browser
def test_the_page_of_the_real_checkpoint_in_a_browser(tmp_path: Path) -> None:
    directory = tmp_path / "SmolLM2-135M-Instruct"
    convert(demo_checkpoint.fetch(), directory)
    torch.set_num_threads(2)
    page = tmp_path / "report.html"
    assert main(["report", str(directory), "--html", str(page)]) == 0
    pictures, rows = in_browser(page)
    assert pictures == 4
    assert rows > 400
