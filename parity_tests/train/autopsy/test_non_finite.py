"""Steps that are not finite: the autopsy names what is not finite first, and the documents that have it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from parity_tests.train.autopsy.planted import options_of, resave
from parity_tests.train.runs import Tiny, run_flags, saved_steps
from train import checkpoints
from train.__main__ import main
from train.autopsy.non_finite import backward_place
from train.data.provenance import batch_rows
from train.data.sources import find_sources
from train.data.tokens import read_tokens
from train.program.statistics import Norms

SAVED = 9
TOKEN, UNUSED = 17, 2
EMBEDDING = "model.embed_tokens.weight"


def planted(finished: Path, out: Path, edit: Callable[[str, np.ndarray], None]) -> Path:
    """The run with arrays of the checkpoint of step 9, its last, edited in place, and resumed to its end.

    Args:
        edit: called with every parameter's name, and that of its moments, as in "nu.model.norm.weight".
    """
    shutil.copytree(finished, out)
    shutil.rmtree(out / checkpoints.FOLDER / "12", ignore_errors=True)

    def edited(tree: Any, prefix: str = "") -> Any:
        def change(path: Any, leaf: Any) -> Any:
            values = np.array(leaf)
            edit(prefix + jax.tree_util.keystr(path, simple=True, separator="."), values)
            return values

        return jax.tree_util.tree_map_with_path(change, tree)

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def edited_adam(node: Any) -> Any:
        if not is_adam(node):
            return node
        return node._replace(mu=edited(node.mu, "mu."), nu=edited(node.nu, "nu."))

    def edit_state(params: Any, opt_state: Any) -> tuple[Any, Any]:
        return edited(params), jax.tree.map(edited_adam, opt_state, is_leaf=is_adam)

    with pytest.MonkeyPatch.context() as patch:
        # a run does not save what is not finite: this is damage in memory
        patch.setattr(checkpoints, "all_finite", lambda tree: True)
        resave(out, SAVED, edit_state)
    assert saved_steps(out)[-1] == SAVED
    assert main(["resume", str(out)]) == 2
    return out


def autopsy(run: Path, step: int, *flags: str) -> dict[str, Any]:
    """The JSON of the step's autopsy; the page is written as well."""
    file, page = run.parent / "autopsy.json", run.parent / "autopsy.html"
    flags = ("--history=2", "--horizon=0", *flags)
    assert main(["autopsy", str(run), str(step), f"--json={file}", f"--html={page}", *flags]) == 0
    found = json.loads(file.read_text())
    assert found["causes"][0]["kind"] == "not finite"
    assert found["causes"][0]["name"] in page.read_text()
    return found


def step_with_token(run: Path, after: int) -> int:
    """The first step after `after` whose batch has TOKEN."""
    steps = range(after + 1, 13)
    return next(step for step in steps if any(TOKEN in row for row in rows(run, step)))


def rows(run: Path, step: int) -> list[list[int]]:
    """The ids of every row of a step's batch."""
    options = options_of(run)
    sources = find_sources(options.data)
    split = sources[0].open("train")
    found = batch_rows(
        sources,
        step,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )
    return [read_tokens(split, *row["tokens"], 64).tolist() for row in found]


def test_a_row_of_the_embedding(finished: Path, tmp_path: Path) -> None:
    """NaN for one token: the checkpoint is at fault, whichever step the run failed in."""

    def edit(name: str, values: np.ndarray) -> None:
        if name == EMBEDDING:
            values[TOKEN] = np.nan

    run = planted(finished, tmp_path / "run", edit)
    found = autopsy(run, step_with_token(run, SAVED))
    (cause,) = (cause for cause in found["causes"] if not cause["may_be_a_result"])
    assert cause["name"] == (
        f"not finite in the checkpoint of step {SAVED}: {EMBEDDING}: 32 of 2,048 numbers, in row {TOKEN}"
    )
    assert cause["since"] == SAVED + 1
    # documents keep their own loss: only those with the token have none
    lost = [document for document in found["documents"] if document["loss"] is None]
    assert 0 < len(lost) < len(found["documents"])


def test_a_moment(finished: Path, tmp_path: Path) -> None:
    """An infinite second moment keeps all finite but itself; the run stops when it would save."""

    def edit(name: str, values: np.ndarray) -> None:
        if name == "nu.model.layers.mlp.up_proj.weight":
            values[1, 5, 7] = np.inf

    run = planted(finished, tmp_path / "run", edit)
    (cause,) = autopsy(run, 12)["causes"][:1]
    assert cause["name"] == (
        f"not finite in the checkpoint of step {SAVED}: nu.model.layers.mlp.up_proj.weight of layer 1: "
        "1 of 1,536 numbers, in row 5"
    )


def test_an_update(finished: Path, tmp_path: Path) -> None:
    """A first moment near the largest number: loss and gradient are finite, and the update is not."""

    def edit(name: str, values: np.ndarray) -> None:
        if name == f"mu.{EMBEDDING}":
            values[UNUSED] = 3e38

    run = planted(finished, tmp_path / "run", edit)
    (later, *_) = autopsy(run, 12)["causes"]
    assert later["name"].startswith("step 10 left a state that is not finite: see `python -m train")
    assert later["since"] == 10
    (cause, *_) = autopsy(run, 10)["causes"]
    name = f"the update of step 10 is not finite: {EMBEDDING}: 32 of 2,048 numbers, in row {UNUSED}"
    assert cause["name"] == name


def test_a_layer(finished: Path, tmp_path: Path) -> None:
    """Weights of a layer so large that what it adds overflows float32, but not float64."""

    def edit(name: str, values: np.ndarray) -> None:
        if name in ("model.layers.mlp.up_proj.weight", "model.layers.mlp.down_proj.weight"):
            values[1] *= np.float32(1e25)

    run = planted(finished, tmp_path / "run", edit)
    (cause, *_) = autopsy(run, 10)["causes"]
    assert cause["name"] == "MLP of layer 1 is not finite in float32"
    assert any("in float64 all is finite" in line for line in cause["evidence"])


def test_the_backward_pass(finished: Path, tmp_path: Path) -> None:
    """The head's input so large that the squares of its gradient overflow; the logits are as before."""

    def edit(name: str, values: np.ndarray) -> None:
        if name == "model.norm.weight":
            values *= np.float32(1e21)
        if name == "lm_head.weight":
            values *= np.float32(1e-21)

    run = planted(finished, tmp_path / "run", edit)
    (cause, *_) = autopsy(run, 10)["causes"]
    assert cause["name"] == "the norm of the gradient of lm_head.weight is not finite in float32"
    assert cause["evidence"][0].startswith("the forward pass is finite")
    assert any("in float64 all is finite" in line for line in cause["evidence"])


@pytest.mark.slow
def test_documents_that_overflow_bfloat16(tiny: Tiny, tmp_path: Path) -> None:
    """The largest float32 for one token: infinite once it is cast, in the documents with the token."""
    run = tmp_path / "begun"
    flags = run_flags(tiny, run, model__compute_dtype="bfloat16", evaluation__every=0)
    assert main(flags) == 0

    def edit(name: str, values: np.ndarray) -> None:
        if name == EMBEDDING:
            values[TOKEN] = np.finfo(np.float32).max

    run = planted(run, tmp_path / "run", edit)
    step = step_with_token(run, SAVED)
    found = autopsy(run, step, "--horizon=1")
    (cause, *_) = found["causes"]
    assert cause["name"].startswith("the embedding is not finite in bfloat16, in ")
    split = find_sources([str(tiny.data)])[0].open("train")
    for document in found["documents"]:
        ids = read_tokens(split, *document["tokens"], 64).tolist()
        blamed = document["tokens"] in [other["tokens"] for other in cause["documents"]]
        assert blamed == (TOKEN in ids)
    outcomes = {outcome["name"]: outcome["losses"] for outcome in found["counterfactuals"]}
    assert outcomes["as it was"][0] is None
    assert outcomes["without the documents that are not finite"][0] is not None


def test_the_first_gradient_backwards() -> None:
    def norms(*values: float) -> Norms:
        array = np.array(values if len(values) > 1 else values[0])
        return Norms(array, array, array)

    names = ("lm_head.weight", "model.norm.weight", "model.layers.mlp.up_proj.weight", EMBEDDING)
    head, norm, up, embedding = names
    finite = {head: norms(1), norm: norms(1), up: norms(1, 1), embedding: norms(1)}
    assert backward_place(finite) is None
    broken = finite | {embedding: norms(np.nan), up: norms(np.nan, np.inf)}
    assert backward_place(broken) == f"{up} of layer 1"
    assert backward_place(broken | {norm: norms(np.inf)}) == norm
    assert backward_place(finite | {embedding: norms(np.nan)}) == embedding
