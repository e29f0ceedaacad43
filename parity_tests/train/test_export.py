"""Exports: transformers loads every tensor, and the loss is the one that the run reported."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from train.__main__ import main
from train.model.evaluate import evaluate_target
from train.monitoring.metrics_log import read_metrics
from train.options import TokenOptions


def test_pytorch_has_the_loss_the_run_reported(finished, tmp_path, capsys):
    assert main(["export", str(finished), str(tmp_path / "hf"), "--verify"]) == 0
    err = capsys.readouterr().err
    reported = [
        line["validation_loss"] for line in read_metrics(finished) if "validation_loss" in line
    ]
    assert f"reported by the run {reported[-1]:.6f}" in err
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())


def test_a_loss_that_differs_is_refused(finished, tmp_path, capsys):
    """The check can fail: here the reported loss is changed in its fourth digit."""
    run = shutil.copytree(finished, tmp_path / "run")
    lines = read_metrics(run)
    for line in lines:
        if "validation_loss" in line:
            line["validation_loss"] *= 1.0002
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["export", str(run), str(tmp_path / "hf"), "--verify"]) == 2
    assert "the run's loss" in capsys.readouterr().err


def test_an_older_step_and_another_dtype(finished, tmp_path, capsys):
    out = tmp_path / "hf"
    assert main(["export", str(finished), str(out), "--step", "9", "--dtype", "bfloat16"]) == 0
    dtypes = {str(tensor.dtype) for tensor in load_file(out / "model.safetensors").values()}
    assert dtypes == {"bfloat16"}
    assert main(["export", str(finished), str(tmp_path / "new"), "--step", "5"]) == 2
    assert "step: found 5, expected one of 9, 12" in capsys.readouterr().err


def test_an_export_does_not_replace_a_checkpoint(finished, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["export", str(finished), str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: already contains a checkpoint; choose another directory or remove it\n"
    )
    assert (tmp_path / "config.json").read_text() == "{}"


def test_eval_of_a_directory_that_does_not_exist(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/missing: no such directory\n"


def test_eval_of_a_run_and_of_its_export_agree(finished, tmp_path, tiny, capsys):
    assert main(["export", str(finished), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    common = ["--sequence-length", "16", "--batch-size", "4"]
    losses = []
    for target, extra in ((finished, []), (tmp_path / "hf", ["--data", str(tiny.data)])):
        assert main(["eval", str(target), *extra, *common]) == 0
        losses.append(float(capsys.readouterr().out.split()[1]))
    assert losses[0] == losses[1]


def test_eval_refuses_missing_data_and_other_tokenizers(finished, tmp_path, tiny, capsys):
    assert main(["export", str(finished), str(tmp_path / "hf")]) == 0
    assert main(["eval", str(tmp_path / "hf")]) == 2
    assert "is not a run folder (no run.toml), so --data is required" in capsys.readouterr().err
    other = shutil.copytree(tmp_path / "hf", tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["a new word"] = 63 + 1
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert main(["eval", str(other), "--data", str(tiny.data)]) == 2
    assert "found a tokenizer with digest " in capsys.readouterr().err


def test_the_loss_is_per_valid_token(finished, tiny):
    """The loss does not depend on the batch size: padding does not count."""
    evaluations = [
        evaluate_target(
            finished,
            (str(tiny.data),),
            _options(finished),
            limit=0,
            batch_size=size,
            sequence_length=16,
            step=None,
            dtype="float32",
            tokens=TokenOptions(),
        )["data"]
        for size in (1, 7)
    ]
    assert evaluations[0].num_tokens == evaluations[1].num_tokens
    np.testing.assert_allclose(evaluations[0].loss, evaluations[1].loss, rtol=1e-6)


def test_a_run_from_initial_weights(finished, tmp_path, tiny, capsys):
    """A run that starts from an export starts with its loss, and checks the weights first."""
    assert main(["export", str(finished), str(tmp_path / "hf")]) == 0
    flags = ["--model.init-from", str(tmp_path / "hf"), "--data", str(tiny.data), "--steps", "1"]
    flags += ["--sequence-length", "16", "--optimizer.learning-rate", "0", "--evaluation.batches=2"]
    flags += ["--evaluation.sample-tokens", "0"]
    assert main(["run", "--out", str(tmp_path / "run"), *flags]) == 0
    before = [line for line in read_metrics(finished) if "validation_loss" in line][-1]
    after = [line for line in read_metrics(tmp_path / "run") if "validation_loss" in line][-1]
    np.testing.assert_allclose(after["validation_loss"], before["validation_loss"], rtol=1e-6)

    tensors = dict(load_file(tmp_path / "hf" / "model.safetensors"))
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    capsys.readouterr()
    assert main(["run", "--out", str(tmp_path / "other"), *flags]) == 2
    assert "model.norm.weight: missing" in capsys.readouterr().err


def test_a_run_that_this_version_would_refuse(finished, tmp_path, capsys):
    """In float16, with a schedule that does not fit: it cannot be resumed, but it can be exported."""
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "run.toml").read_text()
    old = text.replace('compute_dtype = "float32"', 'compute_dtype = "float16"')
    old = old.replace("warmup_steps = 2", "warmup_steps = 20")
    assert old.count("20") > text.count("20")
    assert "float16" in old
    (run / "run.toml").write_text(old)
    assert main(["resume", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model.compute-dtype: found float16, expected bfloat16")
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    for dtype in ("float16", "float32"):
        assert main(["eval", str(run), "--batches", "1", "--dtype", dtype]) == 0
    half, single = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert 0 < abs(half - single) < 1e-2


@pytest.mark.parametrize("target", ["nothing", "file"])
def test_export_from_nothing_or_to_a_file(finished, tmp_path, target, capsys):
    (tmp_path / "file").write_text("")
    if target == "nothing":
        assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "hf")]) == 2
    else:
        assert main(["export", str(finished), str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def _options(run):
    from train.__main__ import _saved_options

    return _saved_options(run)
