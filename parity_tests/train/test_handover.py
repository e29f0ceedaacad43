"""A run that moves to torch and back is the run that stayed, in float64: every parameter and moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_jax.config import LlamaConfig
from parity_tests import resume_torch
from parity_tests.harness.cases import BASE
from parity_tests.reference.errors import worst
from parity_tests.reference.oracle import oracle
from parity_tests.train.runs import Tiny, run_flags
from train.__main__ import _saved_options, main
from train.data.sources import find_sources
from train.model.export_state import batch_numbers
from train.model.training_state import digest_of
from train.program.build import initial_params, model_of, run_program

HANDOVER_BAR = 1e-9  # relative, in float64
CONFIG = BASE | {"vocab_size": 64, "attention_bias": True}  # biases do not decay
STATE = "training_state"
MOMENTS = "exp_avg", "exp_avg_sq"


class OracleModel:
    """The oracle with the weights of a directory, called as transformers' model is."""

    def __init__(self, directory: Path, dtype: str) -> None:
        tensors = load_file(directory / "model.safetensors")
        self.weights = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}

    def to(self, device: str) -> OracleModel:
        return self

    def train(self) -> OracleModel:
        return self

    def named_parameters(self) -> Any:
        return self.weights.items()

    def __call__(self, attention_mask: torch.Tensor, use_cache: bool, **inputs: Any) -> Any:
        segments = (inputs["position_ids"] == 0).cumsum(-1)
        same = segments[:, None, :, None] == segments[:, None, None, :]
        assert torch.equal(attention_mask, same.tril())
        return oracle(CONFIG, self.weights, segment_ids=segments, **inputs)


class Handover(NamedTuple):
    """What the tests compare.

    start: the run's initial weights, with a state of step 0. stayed: the run here, without interruption.
    left: its export after a third of its steps.
    """

    start: Path
    stayed: Path
    left: Path
    steps: int


@pytest.fixture(scope="module", autouse=True)
def _float64() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module", params=[4, pytest.param(50, marks=pytest.mark.slow)])
def handover(
    request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Handover:
    folder, steps = tmp_path_factory.mktemp("handover"), request.param
    (folder / "config.json").write_text(json.dumps(CONFIG))
    stayed = folder / "stayed"
    flags = run_flags(
        tiny, stayed, steps=3 * steps, checkpoint__every=steps, checkpoint__keep_last=3,
        model__config=folder / "config.json", model__parameter_dtype="float64",
        model__compute_dtype="float64", micro_batches=2, optimizer__z_loss=1e-3,
        optimizer__schedule="wsd", optimizer__decay_fraction=0.5, evaluation__every=0, seed=3,
    )  # fmt: skip
    assert main(flags) == 0
    assert export(stayed, folder / "left", steps) == 0
    return Handover(initial_state(stayed, folder), stayed, folder / "left", steps)


def export(run: Path, directory: Path, step: int) -> int:
    return main(["export", str(run), str(directory), "--with-optimizer", "--step", str(step)])


def initial_state(run: Path, folder: Path) -> Path:
    """What an export of step 0 would be: no run has a checkpoint of it."""
    start = folder / "start"
    options = _saved_options(run)
    shutil.copytree(folder / "left", start)
    program = run_program(options, LlamaConfig.from_pretrained(run))
    params = initial_params(program, options.seed)
    model_of(program, params).save_pretrained(start)
    zeros = jax.tree.map(jax.numpy.zeros_like, params)
    for moment in MOMENTS:
        model_of(program, zeros).save_pretrained(start / STATE / moment)
    numbers = list(batch_numbers(options, find_sources(options.data), 0, options.steps))
    np.concatenate(numbers).tofile(start / STATE / "batches.bin")
    return edited(start, lambda state: state.update(step=0) or state["data"].update(first_step=0))


def edited(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Change state.json, and list the files as they are now."""
    path = directory / STATE / "state.json"
    state = json.loads(path.read_text())
    edit(state)
    for name in state["files"]:
        file = directory / name
        state["files"][name] = {"bytes": file.stat().st_size, "sha256": digest_of(file)}
    path.write_text(json.dumps(state))
    return directory


def in_torch(directory: Path, out: Path, steps: int) -> Path:
    resume_torch.train(directory, out, steps, [], "cpu", OracleModel)
    return out


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Parameters and moments of an export."""
    folders = {"": directory} | {f"{name} ": directory / STATE / name for name in MOMENTS}
    return {
        prefix + name: tensor
        for prefix, folder in folders.items()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of any parameter or moment of two exports."""
    error, name = worst(tensors_of(one), tensors_of(other))
    print(f"{one.name} and {other.name}: {error:.1e} ({name})")
    return error


def test_a_run_that_moves_to_torch_and_back(handover: Handover, tmp_path: Path) -> None:
    steps = handover.steps
    moved = in_torch(handover.left, tmp_path / "moved", steps)
    back = tmp_path / "back"
    flags = ["--log.peak-flops", "1e9"]  # strict promotion does not let float64 be timed
    assert main(["run", "--init-from", str(moved), "--out", str(back), *flags]) == 0
    assert export(back, tmp_path / "ours", 3 * steps) == 0
    assert export(handover.stayed, tmp_path / "stayed", 3 * steps) == 0
    theirs = in_torch(handover.start, tmp_path / "theirs", 3 * steps)
    state = json.loads((theirs / STATE / "state.json").read_text())
    assert state["step"] == 3 * steps
    assert difference(tmp_path / "ours", tmp_path / "stayed") <= HANDOVER_BAR
    assert difference(tmp_path / "ours", theirs) <= HANDOVER_BAR
    before = tensors_of(handover.left)["lm_head.weight"]
    assert not torch.allclose(before, tensors_of(theirs)["lm_head.weight"], rtol=1e-3)


def permute_a_moment(directory: Path) -> None:
    """The rows of q_proj as Meta has them."""
    path = directory / STATE / "exp_avg" / "model.safetensors"
    tensors = load_file(path)
    name, heads = "model.layers.1.self_attn.q_proj.weight", CONFIG["num_attention_heads"]
    rows = tensors[name].unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    assert not torch.equal(rows, tensors[name])
    save_file(tensors | {name: rows.contiguous()}, path, {"format": "pt"})
    edited(directory, lambda state: None)


def shift_the_step(directory: Path) -> None:
    """The moments' count, not the position in the data."""

    def shift(state: dict[str, Any]) -> None:
        state["step"] -= 1
        state["data"]["first_step"] -= 1

    edited(directory, shift)


def swap_the_mask(directory: Path) -> None:
    def swap(state: dict[str, Any]) -> None:
        names = load_file(directory / "model.safetensors").keys()
        adamw = state["optimizer"]
        adamw["no_decay"] = [name for name in names if name not in adamw["no_decay"]]

    edited(directory, swap)


@pytest.mark.parametrize("mistake", [None, permute_a_moment, shift_the_step, swap_the_mask])
def test_a_mistake_is_seen(
    handover: Handover, mistake: Callable[[Path], None] | None, tmp_path: Path
) -> None:
    """The comparison fails for each of them, and holds without one."""
    wrong = Path(shutil.copytree(handover.left, tmp_path / "wrong"))
    if mistake is not None:
        mistake(wrong)
    moved = in_torch(wrong, tmp_path / "moved", handover.steps)
    assert export(handover.stayed, tmp_path / "stayed", 2 * handover.steps) == 0
    error = difference(moved, tmp_path / "stayed")
    assert error <= HANDOVER_BAR if mistake is None else error > 1e4 * HANDOVER_BAR


def test_a_swapped_mask_is_refused_here(
    handover: Handover, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = Path(shutil.copytree(handover.left, tmp_path / "wrong"))
    swap_the_mask(wrong)
    assert main(["run", "--init-from", str(wrong), "--out", str(tmp_path / "run")]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "state.json: no_decay: differs at lm_head.weight" in err
    assert not (tmp_path / "run").exists()
