"""What is wrong with a trace or a recording is said in one line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parity_tests import record_torch
from parity_tests.__main__ import main
from parity_tests.harness.cases import BY_NAME, hf_model, weights_of, write_hf_directory
from parity_tests.record_torch import record, recording
from parity_tests.traces.record_jax import record_jax

CASE = BY_NAME["gqa_2_to_1"]
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 61, (1, 12)))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and a trace of it."""
    folder = tmp_path_factory.mktemp("bad_traces")
    write_hf_directory(folder / "checkpoint", CASE.config, weights_of(CASE.config))
    record(hf_model(CASE.config, weights_of(CASE.config)), IDS, folder / "trace")
    return folder / "checkpoint", folder / "trace"


@pytest.fixture
def trace(recorded: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the trace, to damage."""
    return shutil.copytree(recorded[1], tmp_path / "trace")


def error_of(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def edit(trace: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = trace / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def save(trace: Path, changed: dict[str, Tensor | None]) -> None:
    """Replace or remove arrays in their files."""
    arrays = json.loads((trace / "manifest.json").read_text())["arrays"]
    for name, values in changed.items():
        path = trace / arrays[name]["file"]
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors | ({} if values is None else {name: values}), path)


UP = "model.layers.1.mlp.up_proj.output"

DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (
        lambda trace: (trace / "manifest.json").unlink(),
        "found no manifest.json: not a trace, or its recording did not finish",
    ),
    "broken manifest": (
        lambda trace: (trace / "manifest.json").write_text("{"),
        "manifest.json: not valid JSON",
    ),
    "no digests": (
        lambda trace: edit(trace, lambda manifest: manifest.pop("weights")),
        "weights: missing; which model was recorded cannot be told",
    ),
    "no digest": (
        lambda trace: edit(trace, lambda manifest: manifest.update(weights={})),
        "weights: no digest of any",
    ),
    "other format": (
        lambda trace: edit(trace, lambda manifest: manifest.update(format=7)),
        "found format 7, expected 1",
    ),
    "unknown dtype": (
        lambda trace: edit(trace, lambda m: m["precision"].update(parameters="float8")),
        "parameters: found 'float8', expected float64, float32, bfloat16, float16",
    ),
    "dtype that is none": (
        lambda trace: edit(trace, lambda m: m["precision"].update(autocast=["float16"])),
        "autocast: found ['float16'], expected float64, float32, bfloat16, float16",
    ),
    "optimizer without groups": (
        lambda trace: edit(trace, lambda m: m.update(optimizer={"class": "AdamW", "step": 0})),
        "manifest.json: optimizer: expected a step and groups",
    ),
    "group without settings": (
        lambda trace: edit(
            trace, lambda m: m.update(optimizer={"class": "SGD", "step": 0, "groups": [{"lr": 1}]})
        ),
        "manifest.json: optimizer: expected lr, parameters of each group",
    ),
    "missing parameter after the step": (
        lambda trace: edit(
            trace,
            lambda m: m.update(
                optimizer={
                    "class": "SGD",
                    "step": 0,
                    "groups": [{"lr": 1, "parameters": ["model.norm.weight"]}],
                }
            ),
        ),
        "model.norm.weight.stepped: missing",
    ),
    "integers": (
        lambda trace: save(trace, {UP: torch.zeros(1, 12, 44, dtype=torch.int64)}),
        f"{UP}: found int64, expected float64, float32, float16 or bfloat16",
    ),
    "ids that are no integers": (
        lambda trace: save(trace, {"input_ids": torch.full((1, 12), 1.5)}),
        "input_ids: found float32, expected integers",
    ),
    "missing array": (lambda trace: save(trace, {UP: None}), f"{UP}: missing"),
    "missing ids": (
        lambda trace: edit(trace, lambda manifest: manifest["arrays"].pop("input_ids")),
        "input_ids: missing",
    ),
    "array of another shape than the manifest says": (
        lambda trace: save(trace, {UP: torch.zeros(1, 12, 3)}),
        f"{UP}: found [1, 12, 3], expected [1, 12, 44]",
    ),
    "missing file": (
        lambda trace: next(trace.glob("*layers.0*")).unlink(),
        "cannot be read (No such file or directory)",
    ),
    "truncated file": (
        lambda trace: next(trace.glob("*layers.0*")).write_bytes(
            next(trace.glob("*layers.0*")).read_bytes()[:-100]
        ),
        "truncated",
    ),
    "file outside": (
        lambda trace: edit(trace, lambda m: m["arrays"][UP].update(file="../x.safetensors")),
        "names the file '../x.safetensors', outside the folder",
    ),
    "unknown name": (
        lambda trace: edit(
            trace,
            lambda m: m["arrays"].update({"model.router.output": m["arrays"][UP]}),
        ),
        "model.router.output: ",
    ),
    "ids of another tokenizer": (
        lambda trace: save(trace, {"input_ids": torch.full((1, 12), 61)}),
        "found token 61, expected 0 to 60: ids of another tokenizer",
    ),
    "labels outside": (
        lambda trace: save(trace, {"labels": torch.full((1, 12), -7)}),
        "labels: found -7, expected -100 or 0 to 60",
    ),
    "more layers": (
        lambda trace: edit(trace, lambda m: m["shape"].update(num_hidden_layers=3)),
        "of another model than",
    ),
    "other weights": (
        lambda trace: edit(trace, lambda m: m.update(weights=dict.fromkeys(m["weights"], "0"))),
        "none of its 21 weights is the checkpoint's, by SHA-256",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(
    damage: str, recorded: tuple[Path, Path], trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGE[damage]
    change(trace)
    line = error_of(["check", trace, "--model", recorded[0]], capsys)
    assert message in line
    assert str(trace) in line


def test_arguments(
    recorded: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, trace = recorded
    assert "give --model HF_DIR or a second trace" in error_of(["check", trace], capsys)
    assert "--html: only for a check with --model" in error_of(
        ["check", trace, trace, "--html", tmp_path / "page.html"], capsys
    )
    for option, value in (("--autocast", "bf16"), ("--attention", "eager")):
        options = "--out", tmp_path / "new", "--program", "llama_jax", option, value
        assert f"{option}: only for --program transformers" in error_of(
            ["record", directory, *options], capsys
        )
    assert "absent: no such trace" in error_of(
        ["check", tmp_path / "absent", "--model", directory], capsys
    )
    assert f"{trace}: exists, expected a new folder" in error_of(
        [
            "record",
            directory,
            "--out",
            trace,
            "--program",
            "llama_jax",
            "--tokens",
            tokens(tmp_path),
        ],
        capsys,
    )
    assert f"{trace}: exists, expected a new folder" in error_of(
        ["record", directory, "--out", trace, "--tokens", tokens(tmp_path)], capsys
    )
    assert "--length: found 1, expected at least 2" in error_of(
        ["record", directory, "--out", tmp_path / "new", "--length", 1], capsys
    )


def tokens(folder: Path) -> Path:
    path = folder / "tokens.txt"
    path.write_text("1 2 3 4")
    return path


def test_a_trace_of_another_shape(tmp_path: Path, recorded: Any, capsys: Any) -> None:
    other = BY_NAME["mha"]
    record(hf_model(other.config, weights_of(other.config)), IDS, tmp_path / "mha")
    line = error_of(["check", tmp_path / "mha", "--model", recorded[0]], capsys)
    assert "of another model than" in line
    assert "num_key_value_heads: found 4, expected 2" in line


def model() -> Any:
    return hf_model(CASE.config, weights_of(CASE.config)).eval()


class OtherNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(61, 8), nn.Linear(8, 61)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids))


def test_names_of_torch_modules(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none of the names of Hugging Face, .* its modules: out, table"
    ):
        record(OtherNames(), IDS, tmp_path / "trace")
    with pytest.raises(ValueError, match="'tabel' is no module of the model, which has out, table"):
        record(OtherNames(), IDS, tmp_path / "trace", names={"tabel": "model.embed_tokens"})
    with pytest.raises(ValueError, match=r"model\.table is no module of Hugging Face's Llama"):
        record(OtherNames(), IDS, tmp_path / "trace", names={"table": "model.table"})
    with pytest.raises(ValueError, match="need heads="):
        record(OtherNames(), IDS, tmp_path / "trace", names={"out": "lm_head:pairs"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS[:0], {}, r"input_ids: found shape \[0, 12\], expected at least one token"),
        (IDS[:, :0], {}, r"input_ids: found shape \[1, 0\], expected at least one token"),
        (IDS + 100, {}, "input_ids: found token 1.., expected 0 to 60"),
        (IDS.tolist(), {}, "expected a tensor of token ids"),
        (IDS, {"labels": IDS[:, :3]}, r"labels: found \[1, 3\], expected \[1, 12\]"),
        (IDS, {"labels": IDS - 7000}, "labels: found token -6..., expected 0 to 60"),
        (IDS, {"heads": (4, 2)}, r"heads: found \(4, 2\), expected \(query, key/value, size"),
        (IDS, {"names": {"lm_head": 3}}, "names: 'lm_head': found 3, expected a name, or several"),
        (IDS, {"names": {}}, "names: found none, expected names of lm_head, model"),
        (
            IDS,
            {"attention_mask": torch.ones(1, 1, 12, 12)},
            "attention_mask: found one that is not",
        ),
    ],
)
def test_calls_that_cannot_be_recorded(
    ids: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        record(model(), ids, tmp_path / "trace", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_without_gradients(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter requires a gradient: give backward=False"):
        record(model().requires_grad_(False), IDS, tmp_path / "trace")


def test_two_recordings_of_one_name(tmp_path: Path) -> None:
    (tmp_path / ".trace.partial").mkdir()  # of a recording that was killed

    def record_both() -> None:
        with recording(llama := model(), tmp_path / "trace"):
            llama(IDS)
            record(model(), IDS, tmp_path / "other").rename(tmp_path / "trace")

    with pytest.raises(ValueError, match="was written by another program in the meantime"):
        record_both()
    assert (tmp_path / "trace" / "manifest.json").is_file()


def test_recordings_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = model()
    with pytest.raises(ValueError, match="called 0 times"), recording(llama, tmp_path / "trace"):
        pass
    with pytest.raises(ValueError, match="called 2 times"), recording(llama, tmp_path / "trace"):
        [llama(IDS), llama(IDS)]
    with (
        pytest.raises(ValueError, match="not called with token ids"),
        recording(llama, tmp_path / "trace"),
    ):
        llama(inputs_embeds=torch.zeros(1, 4, 32))
    llama(IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="has gradients already"):
        record(llama, IDS, tmp_path / "trace")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(record_torch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"0\.00 MB are free"):
        record(model(), IDS, tmp_path / "trace")
    monkeypatch.delattr(Tensor, "register_post_accumulate_grad_hook")
    with pytest.raises(ValueError, match=r"lacks hooks on gradients, expected 2\.4 or newer"):
        record(model(), IDS, tmp_path / "trace")
    assert not list(tmp_path.iterdir())
    options = [str(tmp_path / "absent"), "--out", str(tmp_path / "trace"), "--length", "-5"]
    assert record_torch.main(options) == 2
    assert capsys.readouterr().err.endswith("error: --length: found -5, expected at least 2\n")
    assert record_torch.main([str(tmp_path / "absent"), "--out", str(tmp_path / "trace")]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"error: {tmp_path / 'absent'}: no such directory"
    )


def test_names_of_jax_arrays(tmp_path: Path) -> None:
    def run(names: dict[str, str]) -> None:
        record_jax(
            lambda x: (jnp.sum(x), {"x": x}),
            jnp.ones(3),
            tmp_path / "trace",
            inputs={"input_ids": np.zeros((1, 3), np.int32)},
            names=names,
            weights=lambda x: {"model.norm.weight": x},
        )

    with pytest.raises(ValueError, match="no array named 'y' that can be recorded"):
        run({"y": "model.norm.output"})
    with pytest.raises(ValueError, match=r"'model\.x' is not the name of an array of a trace"):
        run({"x": "model.x"})
    assert not list(tmp_path.iterdir())


def test_the_recorder_needs_nothing_of_the_project(tmp_path: Path) -> None:
    text = Path(record_torch.__file__).read_text()
    imported = {
        line.split()[1].split(".")[0]
        for line in text.splitlines()
        if line.startswith(("import", "from"))
    }
    assert imported <= {"torch", "safetensors", *sys.stdlib_module_names}
