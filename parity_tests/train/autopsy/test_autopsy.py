"""`python -m train autopsy` of an undisturbed run: what is replayed, recorded and written; wrong input."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import LlamaForCausalLM
from parity_tests.train.runs import Tiny, run_flags, saved_steps
from train import checkpoints
from train.__main__ import main
from train.autopsy.documents import without
from train.autopsy.history import replay_history
from train.autopsy.record import Recorded, record_step
from train.autopsy.replay import Replay, open_replay, state_at
from train.flags import parse_options
from train.monitoring.metrics_log import read_metrics
from train.options import FILE, RunOptions
from train.options_toml import flags_of

STEP = 11


@pytest.fixture(scope="module")
def output(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of an autopsy, and beside it the page and what was printed."""
    directory = tmp_path_factory.mktemp("autopsy")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    files = [f"--json={directory / 'a.json'}", f"--html={directory / 'a.html'}"]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda text="", **_: lines.append(text))
        assert main(["autopsy", str(finished), str(STEP), "--horizon", "1", *files]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    found = json.loads((directory / "a.json").read_text())
    return found | {"page": (directory / "a.html").read_text(), "lines": lines}


@pytest.mark.slow
def test_nothing_unusual(output: dict[str, Any]) -> None:
    assert output["causes"] == []
    assert not output["unusual"]
    assert output["lines"][0] == f"step {STEP}: nothing unusual"
    assert f"step {STEP}: nothing unusual" in output["page"]
    assert output["page"].count("data:image/png;base64,") == 2


@pytest.mark.slow
def test_the_replay_is_the_run(finished: Path, output: dict[str, Any]) -> None:
    """Bit for bit, with the losses that are recorded; the counterfactual without a change too."""
    assert output["replay"] == {"from": 0, "steps_compared": STEP, "different": []}
    losses = {line["step"]: line["loss"] for line in read_metrics(finished) if "loss" in line}
    unchanged = output["counterfactuals"][0]
    assert unchanged["name"] == "as it was"
    assert unchanged["losses"] == pytest.approx([losses[STEP], losses[STEP + 1]], rel=1e-5)
    assert output["recorded"]["dtype"] == "float64"
    assert output["recorded"]["loss"] == pytest.approx(losses[STEP], rel=1e-5)
    names = [outcome["name"] for outcome in output["counterfactuals"]]
    assert len(names) == 5
    for part in ("without the document", "0.1 times as large", "beta2 0.99", "clipped by layer"):
        assert any(part in name for name in names), part


@pytest.fixture(scope="module")
def replayed(finished: Path) -> Any:
    """A replay, its history to the step, and the step recorded in float64."""
    options = parse_options(RunOptions(), flags_of(finished / FILE), finished / FILE)
    with ExitStack() as stack:
        replay = open_replay(finished, options, stack)
        history = replay_history(replay, STEP - 2, STEP, 1, lambda step: None)
        recorded = record_step(
            replay,
            STEP,
            history.states[STEP - 1],
            history.windows,
            history.steps[-1].pieces,
            "float64",
        )
        yield replay, history, recorded


def reference(replay: Replay, params: Any, windows: Any) -> tuple[float, Any]:
    """Loss and gradient of the public model in float64, which sees one document at a time."""

    def loss(params: Any) -> Any:
        model: LlamaForCausalLM = nnx.merge(replay.program.graphdef, params)
        total, count = jnp.zeros(()), 0
        for ids, labels, segments in zip(
            windows["input_ids"], windows["labels"], windows["segment_ids"], strict=True
        ):
            for segment in range(segments[-1] + 1):
                at = segments == segment
                if not (labels[at] >= 0).any():
                    continue
                logits = model(jnp.asarray(ids[at])[None]).logits[0]
                chosen = labels[at] >= 0
                log_probabilities = jax.nn.log_softmax(logits[chosen])
                picked = jnp.take_along_axis(
                    log_probabilities, jnp.asarray(labels[at][chosen])[:, None], axis=1
                )
                total, count = total - jnp.sum(picked), count + int(chosen.sum())
        return total / count

    value, gradient = jax.value_and_grad(loss)(params)
    return float(value), gradient


@pytest.mark.slow
def test_recorded_against_the_model(replayed: Any) -> None:
    """Loss, gradient norms by layer, and what each document has to do with them."""
    replay, history, recorded = replayed
    assert isinstance(recorded, Recorded)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), history.states[STEP - 1][0])
        loss, gradient = reference(replay, params, history.windows)
        assert recorded.loss == pytest.approx(loss, rel=1e-10)
        flat, _ = jax.tree_util.tree_flatten_with_path(gradient)
        assert len(flat) == len(recorded.norms)
        for path, leaf in flat:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            axes = tuple(range(1 if ".layers." in name else 0, leaf.ndim))
            expected = np.sqrt(np.square(leaf).sum(axis=axes))
            np.testing.assert_allclose(recorded.norms[name].gradient, expected, rtol=1e-8)
        whole = np.concatenate([np.ravel(leaf) for _, leaf in flat])
        pieces = history.steps[-1].pieces
        assert sum(piece.piece.labels for piece in pieces) == recorded.num_tokens
        for index in (0, len(pieces) - 1):
            piece, one = pieces[index].piece, recorded.contributions[index]
            left = without(history.windows, [piece])
            loss, rest = reference(replay, params, left)
            rest_flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(rest)])
            share = (recorded.num_tokens - piece.labels) / recorded.num_tokens
            own = whole - share * rest_flat
            cosine = own @ rest_flat / np.linalg.norm(own) / np.linalg.norm(rest_flat)
            assert one.loss_without == pytest.approx(loss, rel=1e-8)
            assert one.norm_without == pytest.approx(np.linalg.norm(rest_flat), rel=1e-8)
            assert one.norm == pytest.approx(np.linalg.norm(own), rel=1e-7)
            assert one.cosine == pytest.approx(cosine, rel=1e-6)


@pytest.mark.slow
def test_the_branches_of_the_residual_stream(replayed: Any) -> None:
    """Against hidden states of the public model: what a layer adds, with and without its MLP."""
    replay, history, recorded = replayed
    config = replay.config
    layers, windows = config.num_hidden_layers, history.windows
    # the last hidden state is after the final norm, so one more layer follows
    more = dataclasses.replace(config, num_hidden_layers=layers + 1)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), history.states[STEP - 1][0])
        stacked = jax.tree.map(
            lambda leaf: jnp.concatenate([leaf, leaf[-1:]]), params["model"]["layers"]
        )
        model = LlamaForCausalLM(more, rngs=nnx.Rngs(0), dtype=jnp.float64)
        graphdef = nnx.graphdef(model)

        def hidden(without_mlp: int | None = None) -> Any:
            down = stacked["mlp"]["down_proj"]["weight"]
            if without_mlp is not None:
                down = down.at[without_mlp].set(0)
            mlp = stacked["mlp"] | {"down_proj": {"weight": down}}
            tree = params | {"model": params["model"] | {"layers": stacked | {"mlp": mlp}}}
            out = nnx.merge(graphdef, tree)(
                jnp.asarray(windows["input_ids"]),
                position_ids=jnp.asarray(windows["position_ids"]),
                segment_ids=jnp.asarray(windows["segment_ids"]),
                output_hidden_states=True,
            )
            return out.hidden_states

        def rms(x: Any) -> float:
            return float(np.sqrt(np.mean(np.square(x))))

        whole = hidden()
        for layer in range(layers):
            attention = hidden(layer)[layer + 1] - whole[layer]
            mlp = whole[layer + 1] - whole[layer] - attention
            expected = rms(whole[layer]), rms(attention), rms(mlp)
            assert [float(part[layer]) for part in recorded.branches] == pytest.approx(expected)


@pytest.mark.slow
def test_the_recorded_update(replayed: Any, finished: Path) -> None:
    """Against what the run's step made of the parameters, in float32."""
    replay, history, recorded = replayed
    before = history.states[STEP - 1][0]
    after, _ = state_at(replay, STEP + 1)
    assert STEP + 1 in saved_steps(finished)
    norms = history.steps[-1].statistics.norms
    total = np.sqrt(sum(np.square(norm.update).sum() for norm in norms.values()))
    assert recorded.terms.update == pytest.approx(total, rel=1e-4)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    rate = next(line["learning_rate"] for line in read_metrics(finished) if line["step"] == STEP)
    assert recorded.terms.learning_rate == pytest.approx(rate)


# Orbax leaves the other arrays' reads unfinished where one fails
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_mistakes_are_one_line(
    tiny: Tiny, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = tmp_path / "late"
    shutil.copytree(finished, late)
    for step in saved_steps(late)[:-1]:
        shutil.rmtree(late / checkpoints.FOLDER / str(step))
    few = ["--history", "2"]
    (late / FILE).write_text((late / FILE).read_text().replace("every = 3", "every = 1"))
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    text = (moved / FILE).read_text()
    (moved / FILE).write_text(text.replace(str(tiny.data), str(tmp_path / "gone")))
    changed = tmp_path / "changed"
    shutil.copytree(finished, changed)
    (changed / FILE).write_text(text.replace(str(tiny.data), str(data)))
    shard = next(data.glob("train*.tokens"))
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(bytes(content))
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    files = (damaged / checkpoints.FOLDER / "9" / "params").rglob("*")
    largest = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    for arguments, message in (
        ([str(tmp_path / "none"), "3"], f"{tmp_path / 'none'}: no such directory"),
        ([str(tiny.data), "3"], f"{tiny.data}: not the folder of a run"),
        ([str(finished), "0"], "step: found 0, expected at least 1"),
        ([str(finished), "13"], "step: found 13, expected at most 12, the last step that"),
        ([str(finished), "x"], "STEP: "),
        ([str(finished), "3", "--horizon", "-1"], "--horizon: "),
        ([str(finished), "3", "--beta2", "1.5"], "beta2: found 1.5, expected at least 0"),
        ([str(late), "9", *few], f"{late}: no checkpoint before step 9 is kept (found 12)"),
        ([str(moved), "3"], f"{tmp_path / 'gone'}: not found, expected the data of {moved}"),
        ([str(changed), "3"], f"{shard}: "),
        ([str(moved), "3", "--data", str(data)], f"{shard}: found contents with digest"),
        (
            [str(damaged), "11", "--history", "0"],
            f"{damaged}: the checkpoint of step 9 is damaged: remove it",
        ),
        (["s3://bucket/run", "3"], "s3://bucket/run: is remote; copy the run to this machine"),
    ):
        assert main(["autopsy", *arguments]) == 2, arguments
        err = capsys.readouterr().err
        assert message in err, (arguments, err)
        *before, line = err.splitlines()
        assert line.startswith("error: "), err
        assert before in ([], ["replaying 2 steps, from step 9 to step 11"])
    gc.collect()  # of those reads, before another test is blamed for them


@pytest.mark.slow
def test_muon_with_micro_batches_guard_and_average(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that change the state's structure; float64 parameters and bfloat16 moments too."""
    for number, changes in enumerate(
        (
            {
                "optimizer__name": "muon",
                "micro_batches": 2,
                "guard__action": "skip",
                "guard__window": 4,
                "average__decay": 0.9,
            },
            {"optimizer__state_dtype": "bfloat16", "model__compute_dtype": "bfloat16"},
            {"optimizer__name": "adafactor"},
        )
    ):
        run = tmp_path / f"run{number}"
        assert main(run_flags(tiny, run, evaluation__every=0, **changes)) == 0
        assert main(["autopsy", str(run), "10", "--horizon", "1"]) == 0
        printed = capsys.readouterr().out
        assert "step 10: nothing unusual" in printed
        assert "bit for bit" in printed
