"""`run --init-from`: the run that continues is the one that was exported; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama_jax.config import LlamaConfig
from parity_tests.train.corpus import token_directory
from parity_tests.train.runs import Tiny, metrics_of, run_flags, same_bits, state_of
from train.__main__ import main
from train.model.torch_optimizer import read_optimizer, require_fit
from train.model.training_state import digest_of
from train.options import OptimizerOptions

STATE = "training_state"
EXP_AVG = f"{STATE}/exp_avg/model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's export of step 9. Copy it before use."""
    directory = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["export", str(finished), str(directory), "--with-optimizer", "--step", "9"]) == 0
    return directory


@pytest.fixture
def state(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def edit(directory: Path, change: Callable[[dict[str, Any]], Any], digests: bool = True) -> None:
    path = directory / STATE / "state.json"
    state = json.loads(path.read_text())
    change(state)
    for name in state["files"] if digests else ():
        file = directory / name
        state["files"][name] = {"bytes": file.stat().st_size, "sha256": digest_of(file)}
    path.write_text(json.dumps(state))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def continued(directory: Path, out: Path, *flags: str) -> int:
    return main(["run", "--init-from", str(directory), "--out", str(out), *flags])


def error_of(directory: Path, capfd: pytest.CaptureFixture[str], *flags: str) -> str:
    """The line that a run which cannot continue from `directory` ends with; it leaves no folder."""
    capfd.readouterr()
    out = directory.parent / "run"
    assert continued(directory, out, *flags) == 2
    assert not out.exists()
    (line,) = capfd.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def later_metrics(run: Path, step: int) -> list[dict[str, Any]]:
    return [line for line in metrics_of(run) if line["step"] > step]


def test_it_continues_bit_for_bit(finished: Path, exported: Path, tmp_path: Path) -> None:
    assert continued(exported, tmp_path / "run") == 0
    assert same_bits(state_of(tmp_path / "run", 12), state_of(finished, 12))
    assert later_metrics(tmp_path / "run", 0) == later_metrics(finished, 9)


@pytest.mark.slow
def test_moments_of_bfloat16(tiny: Tiny, tmp_path: Path) -> None:
    """They are exported as they are, and rounded in the same directions afterwards."""
    run, directory = tmp_path / "run", tmp_path / "hf"
    flags = run_flags(tiny, run, steps=6, evaluation__every=0, optimizer__state_dtype="bfloat16")
    assert main(flags) == 0
    assert main(["export", str(run), str(directory), "--with-optimizer", "--step", "3"]) == 0
    assert {t.dtype for t in load_file(directory / EXP_AVG).values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(directory / "model.safetensors").values()} == {torch.float32}
    assert continued(directory, tmp_path / "more") == 0
    assert same_bits(state_of(tmp_path / "more", 6), state_of(run, 6))


def test_it_is_resumed_from_where_it_began(finished: Path, exported: Path, tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint reads the state again."""
    run = tmp_path / "run"
    assert continued(exported, run) == 0
    shutil.rmtree(run / "checkpoints")
    assert main(["resume", str(run)]) == 0
    assert same_bits(state_of(run, 12), state_of(finished, 12))


@pytest.mark.slow
def test_with_other_rounding(exported: Path, tmp_path: Path, finished: Path) -> None:
    """What only changes rounding, or nothing, may differ."""
    flags = ["--micro-batches", "2", "--optimizer.offload", "--model.remat", "full"]
    assert continued(exported, tmp_path / "run", *flags) == 0
    expected = later_metrics(finished, 9)
    for actual, line in zip(later_metrics(tmp_path / "run", 9), expected, strict=True):
        for name in ("loss", "grad_norm", "validation_loss"):
            if name in line:
                np.testing.assert_allclose(actual[name], line[name], rtol=1e-5)


def test_batches_that_are_listed(finished: Path, tmp_path: Path) -> None:
    arguments = ["export", str(finished), str(tmp_path / "hf"), "--with-optimizer", "--step", "9"]
    assert main([*arguments, "--batches", "2"]) == 0
    numbers = np.fromfile(tmp_path / "hf" / STATE / "batches.bin", "<i8").reshape(-1, 8, 2)
    assert numbers.shape[0] == 2


# plain PyTorch --------------------------------------------------------------------------------------


def torch_state(directory: Path, out: Path, **changes: Any) -> torch.optim.AdamW:
    """A directory with weights, tokenizer and optimizer.pt, as a loop in PyTorch would leave it."""
    shutil.copytree(directory, out, ignore=shutil.ignore_patterns(STATE))
    model = AutoModelForCausalLM.from_pretrained(directory)
    moments = {name: load_file(directory / STATE / name / "model.safetensors") for name in MOMENTS}
    decay = [(n, p) for n, p in model.named_parameters() if "norm" not in n]
    rest = [(n, p) for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **({"lr": 3e-3, "betas": (0.9, 0.95)} | changes))
    for name, parameter in model.named_parameters():
        values = {moment: tensors[name] for moment, tensors in moments.items()}
        optimizer.state[parameter] = {"step": torch.tensor(9.0), **values}
    return optimizer


MOMENTS = "exp_avg", "exp_avg_sq"
# what a training_state says and optimizer.pt does not
FLAGS = (
    "--steps=12", "--batch-size=8", "--sequence-length=16", "--optimizer.warmup-steps=2",
    "--evaluation.every=4", "--evaluation.batches=2", "--evaluation.sample-tokens=0",
)  # fmt: skip


def test_a_state_dict_of_torch(finished: Path, exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    directory = tmp_path / "hf"
    torch.save(torch_state(exported, directory).state_dict(), directory / "optimizer.pt")
    assert continued(directory, tmp_path / "run", "--data", str(tiny.data), *FLAGS) == 0
    assert same_bits(state_of(tmp_path / "run", 12), state_of(finished, 12))


@pytest.mark.parametrize("form", ["nested, wrapped", "listed", "by name", "Trainer"])
def test_names_of_parameters(form: str, exported: Path, tmp_path: Path) -> None:
    directory = tmp_path / "hf"
    content: dict[str, Any] = torch_state(exported, directory).state_dict()
    names = [name for group in content["param_groups"] for name in group.pop("param_names")]
    if form == "nested, wrapped":
        content["param_groups"][0]["param_names"] = [f"module._orig_mod.{n}" for n in names[:-5]]
        content["param_groups"][1]["param_names"] = [f"module._orig_mod.{n}" for n in names[-5:]]
        content = {"epoch": 1, "optimizer_states": [content]}  # Lightning's
    elif form == "Trainer":
        (directory / "trainer_state.json").write_text("{}")
    elif form == "listed":
        (directory / "optimizer.json").write_text(json.dumps({"param_names": names}))
        content = {"model": {}, "optimizer": content}
    else:
        content["state"] = {names[key]: value for key, value in content["state"].items()}
        for group in content["param_groups"]:
            group["params"] = [names[key] for key in group["params"]]
    torch.save(content, directory / "optimizer.pt")
    state = read_optimizer(directory)
    assert state.step == 9
    for moment in MOMENTS:
        expected = load_file(exported / STATE / moment / "model.safetensors")
        assert state.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(state.tensors[name][moment], tensor)
            assert state.groups[name]["weight_decay"] == (0.0 if "norm" in name else 0.1)


def without_names(content: dict[str, Any]) -> None:
    for group in content["param_groups"]:
        del group["param_names"]


def decay_everything(content: dict[str, Any]) -> None:
    content["param_groups"][1]["weight_decay"] = 0.1


def decay_nothing(content: dict[str, Any]) -> None:
    content["param_groups"][0]["weight_decay"] = 0.0


TORCH_MISTAKES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (without_names, "optimizer.pt: has no names of parameters"),
    (lambda c: c["state"][3].pop("step"), "expected step too, as torch.optim.AdamW has it"),
    (lambda c: c["state"][3].pop("exp_avg_sq"), "expected exp_avg_sq too"),
    (lambda c: c["state"].pop(3), "self_attn.v_proj.weight: has no moments"),
    (lambda c: c["state"][3].update(step=torch.tensor(8.0)), "found steps 8 at model.layers.0."),
    (lambda c: c["state"][0].update(exp_avg=torch.ones(2, 3)),
     "exp_avg of model.embed_tokens.weight: found shape [2, 3], expected [64, 32]"),
    (decay_everything, "layernorm.weight: weight-decay: found 0.1, expected 0.0: here weight decay"),
    (decay_nothing, "weight-decay: found 0.0, expected 0.1: pass --optimizer.weight-decay"),
    (lambda c: c["param_groups"][0].update(betas=(0.9, 0.999)),
     "beta2: found 0.999, expected 0.95: pass --optimizer.beta2"),
    (lambda c: c["param_groups"][0].update(amsgrad=True), "found amsgrad, expected AdamW without"),
    (lambda c: c["param_groups"][0]["param_names"].pop(), "found 20 different names, expected one"),
    (lambda c: c["param_groups"][0]["param_names"].__setitem__(0, "other.weight"), "other.weight: un"),
    (lambda c: c.clear(), "not what torch.optim.AdamW.state_dict() returns"),
    (lambda c: c["state"].update({3: 5}), "v_proj.weight: found a int, expected a dictionary"),
    (lambda c: c["state"][3].update(step=None), "step: found None, expected a whole number"),
    (lambda c: c["state"][3].update(step=float("nan")), "step: found nan, expected a whole number"),
    (lambda c: c["state"][3].update(step=torch.ones(2)), "expected a whole number"),
    (lambda c: c["state"][3].update(exp_avg=None), "exp_avg: found a NoneType, expected a tensor"),
    (lambda c: c["param_groups"].insert(0, 5), "param_groups: not what torch.optim.AdamW writes"),
    (lambda c: c["param_groups"][0].update(params=[[0]]), "param_groups: not what torch.optim.AdamW"),
    (lambda c: c["param_groups"][0].update(param_names=None), "param_names: not a list of names"),
    (lambda c: c["param_groups"][0].update(param_names=[1]), "param_names: not a list of names"),
    (lambda c: c.update(state={}, param_groups=[{"params": []}]), "found steps of nothing, expected"),
]  # fmt: skip


def shortened(value: object) -> str | None:
    """Names of cases without the addresses of functions, which differ between processes."""
    return value[:40] if isinstance(value, str) else None


@pytest.mark.parametrize(("mistake", "message"), TORCH_MISTAKES, ids=shortened)
def test_a_state_dict_that_does_not_fit(
    mistake: Callable[[dict[str, Any]], Any],
    message: str,
    exported: Path,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "hf"
    content = torch_state(exported, directory).state_dict()
    mistake(content)
    torch.save(content, directory / "optimizer.pt")
    with pytest.raises(ValueError) as caught:
        require_fit(
            read_optimizer(directory), LlamaConfig.from_pretrained(directory), OptimizerOptions()
        )
    line = str(caught.value)
    assert line.startswith(str(directory / "optimizer.pt"))
    assert message in line
    assert len(line.splitlines()) == 1


def test_moments_that_are_not_finite(
    exported: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are found when they are read, once there is a folder."""
    directory = tmp_path / "hf"
    content = torch_state(exported, directory).state_dict()
    content["state"][0]["exp_avg"].fill_(torch.nan)
    torch.save(content, directory / "optimizer.pt")
    arguments = [directory, tmp_path / "run", "--data", str(tiny.data), *FLAGS]
    assert continued(*arguments) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    name = "model.embed_tokens.weight"
    assert line.endswith(f"{name}: exp_avg holds non-finite values as float32")


def test_a_damaged_file_of_torch(
    exported: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "hf"
    torch.save(torch_state(exported, directory).state_dict(), directory / "optimizer.pt")
    content = (directory / "optimizer.pt").read_bytes()
    (directory / "optimizer.pt").write_bytes(content[: len(content) // 2])
    line = error_of(directory, capfd, "--data", str(tiny.data), *FLAGS)
    assert line.startswith(f"{directory}/optimizer.pt: cannot be read (")


# a state that does not fit --------------------------------------------------------------------------


def test_a_missing_moment(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_tensors(state / EXP_AVG, lambda tensors: tensors.pop(NORM))
    edit(state, lambda content: None)
    assert error_of(state, capfd) == f"{state}/{STATE}/exp_avg: 1 problems: {NORM}: missing"


def test_a_moment_of_another_shape(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_tensors(state / EXP_AVG, lambda tensors: tensors.update({NORM: torch.zeros(3)}))
    edit(state, lambda content: None)
    line = error_of(state, capfd)
    assert line == f"{state}/{STATE}/exp_avg: 1 problems: {NORM}: found shape [3], expected [32]"


def test_the_state_of_another_model(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    for moment in MOMENTS:
        edit_tensors(state / STATE / moment / "model.safetensors", change)
    edit(state, lambda content: None)
    line = error_of(state, capfd)
    assert line.startswith(f"{state}/{STATE}/exp_avg: 9 problems: model.layers.1.")


def test_other_weights(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of another step, beside moments of this one, in a file of the same size."""
    weights = np.fromfile(state / "model.safetensors", np.float32)
    weights[-1] *= 1.01
    weights.tofile(state / "model.safetensors")
    line = error_of(state, capfd)
    assert line.startswith(f"{state}/model.safetensors: found contents with digest ")


def test_a_truncated_file(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = (state / EXP_AVG).read_bytes()
    (state / EXP_AVG).write_bytes(content[:-100])
    line = error_of(state, capfd)
    assert line.startswith(
        f"{state}/{STATE}/exp_avg: model.safetensors: found {len(content) - 100} "
    )


def test_a_changed_byte(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = bytearray((state / EXP_AVG).read_bytes())
    content[-1] ^= 1
    (state / EXP_AVG).write_bytes(content)
    line = error_of(state, capfd)
    assert line.startswith(f"{state}/{EXP_AVG}: found contents with digest ")


MANIFESTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.pop("step"), "state.json: step: found None, expected the number of steps done"),
    (
        lambda c: c.update(step="9"),
        "state.json: step: found '9', expected the number of steps done",
    ),
    (lambda c: c.update(format="x"), "state.json: format: found 'x', expected 'llama_jax training"),
    (lambda c: c.pop("files"), "state.json: files: found None, expected an object"),
    (lambda c: c["files"].pop(EXP_AVG), f"state.json: files: has no digest of {EXP_AVG}"),
    (lambda c: c["files"].update({EXP_AVG: "x"}), f"state.json: files: {EXP_AVG}: found 'x'"),
    (lambda c: c["files"].update({"../a": {"bytes": 1, "sha256": ""}}), "expected a file in "),
    (lambda c: c["files"].update({"a": {"bytes": 1, "sha256": ""}}), "hf/a: no such file, but"),
    (lambda c: c["optimizer"].update(name="lion"), "is of another optimizer than adamw"),
    (lambda c: c["optimizer"]["no_decay"].pop(), f"no_decay: differs at {NORM}"),
    (lambda c: c["data"]["sources"][0].update(digest="0"), "found data with digest "),
    (lambda c: c["data"]["sources"].clear(), "data: found 1 token directories, expected 0 by "),
]


@pytest.mark.parametrize(("mistake", "message"), MANIFESTS, ids=shortened)
def test_a_manifest_that_does_not_fit(
    mistake: Callable[[dict[str, Any]], Any],
    message: str,
    state: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    edit(state, mistake, digests=False)
    assert message in error_of(state, capfd)


def test_options_that_cannot_change(
    state: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        (
            ["--optimizer.learning-rate", "0.1"],
            "optimizer.learning-rate: found 0.1, expected 0.003",
        ),
        (["--batch-size", "4"], "batch-size: found 4, expected 8"),
        (["--steps", "9"], "steps: found 9, expected 12"),
        (
            ["--steps", "20"],
            "steps: found 20, expected 12: the cosine schedule has already lowered",
        ),
        (["--optimizer.name", "lion"], "optimizer"),
        (["--model.init-from", str(tmp_path)], "leave one of them out"),
    ):
        assert message in error_of(state, capfd, *flags)
    other = Path(shutil.copytree(tiny.data, tmp_path / "other"))
    token_directory(other, [[[1, 2, 3]] * 20], [[[1, 2]]], vocab_size=64)
    line = error_of(state, capfd, "--data", str(other))
    assert line.startswith(f"{other}: found data with digest ")


def test_a_directory_without_a_state(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished), str(tmp_path / "hf")]) == 0
    assert error_of(tmp_path / "hf", capfd) == (
        f"init-from: {tmp_path}/hf: has neither training_state/state.json nor optimizer.pt; to begin from "
        "its weights alone, use --model.init-from"
    )


def test_a_remote_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for option in ("--init-from", "--model.init-from"):
        arguments = ["run", option, "memory://bucket/hf", "--out", str(tmp_path / "run")]
        assert main(arguments) == 2
        assert capfd.readouterr().err == (
            f"error: {option[2:]}: memory://bucket/hf is remote; copy it to this machine first\n"
        )


def test_exports_that_are_refused(
    finished: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(run: Path, directory: Path, *flags: str) -> str:
        capfd.readouterr()
        assert main(["export", str(run), str(directory), "--with-optimizer", *flags]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        return line

    assert "dtype: found bfloat16 with" in refused(finished, tmp_path / "a", "--dtype", "bfloat16")
    (state / "config.json").unlink()
    assert "already contains a training state" in refused(finished, state)
    lion = Path(shutil.copytree(finished, tmp_path / "lion"))
    text = (lion / "run.toml").read_text()
    assert 'name = "adamw"' in text
    (lion / "run.toml").write_text(text.replace('name = "adamw"', 'name = "lion"'))
    line = refused(lion, tmp_path / "b")
    assert line == ("error: with-optimizer: found lion, expected adamw: torch has the same")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
