"""The coordinate check: slopes, what is measured, and that muP is flat where the standard one is not."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from llama_jax import LlamaConfig, LlamaForCausalLM
from parity_tests.train.runs import CONFIG, Tiny
from train.__main__ import main
from train.coordinates import measure as module
from train.coordinates.measure import measure, names
from train.coordinates.outcome import JSON, PICTURE, Check, slopes, verdict
from train.data.placement import placed_batches
from train.data.sources import find_sources
from train.data.windows import batches
from train.model.config import with_width
from train.options import COORDINATES, ModelOptions
from train.run.training_data import training_windows


def flags(tiny: Tiny, **changes: Any) -> list[str]:
    values = {
        "data": tiny.data,
        "model.config": tiny.config,
        "batch-size": 8,
        "sequence-length": 16,
    } | changes
    return ["coordinates", *(f"--{name}={value}" for name, value in values.items())]


def test_slopes_are_those_of_a_line() -> None:
    rng = np.random.default_rng(0)
    widths, rms = [64, 128, 192, 512], rng.uniform(0.1, 9.0, (4, 3))
    expected = np.polyfit(np.log(widths), np.log(rms), 1)[0]
    np.testing.assert_allclose(slopes(widths, rms), expected, rtol=1e-12)
    assert np.isnan(slopes(widths, np.array([[0.0], [1.0], [np.nan], [1.0]]))).all()


def test_the_verdict() -> None:
    flat = np.array([[1.0, 1.0], [1.0, 1.03]])
    steep = np.array([[1.0, 1.0], [1.0, 0.5]])
    assert verdict(Check("mup", [64, 128], {"a": flat, "b": flat})).startswith("mup: flat: ")
    text = verdict(Check("mup", [64, 128], {"a": flat, "b": steep}))
    assert text == "mup: not flat: the largest slope is -1.000, of the b"
    broken = Check("mup", [64, 128], {"a": np.full((2, 2), np.nan), "b": flat})
    assert verdict(broken) == "mup: not flat: a are not finite, or 0"


def test_what_is_measured(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    """Before the first step, as transformers computes it; all steps are on the first batch."""

    def first_batch(*operands: Any) -> Any:
        with closing(placed_batches(*operands)) as all_batches:
            yield next(all_batches)

    monkeypatch.setattr(module, "placed_batches", first_batch)
    options = replace(
        COORDINATES, data=(str(tiny.data),), batch_size=8, sequence_length=16, steps=2,
        model=ModelOptions(compute_dtype="float32"),
    )  # fmt: skip
    config = LlamaConfig.from_dict(CONFIG)
    sources = find_sources(options.data)
    one = measure(options, config, sources, 1)
    assert list(one) == names(config)
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(params=jax.random.key(0)))
    model.save_pretrained(tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="sdpa")
    batch = next(
        iter(batches(training_windows(options, config, sources), batch_size=8, rows=range(8)))
    )
    ids, positions, segments = (
        torch.from_numpy(batch[name].astype(np.int64))
        for name in ("input_ids", "position_ids", "segment_ids")
    )
    mask = (segments[:, None, :, None] == segments[:, None, None, :]) & torch.ones(
        16, 16
    ).tril().bool()
    with torch.no_grad():
        out = theirs(ids, position_ids=positions, attention_mask=mask, output_hidden_states=True)
    for name, value in (
        ("embedding", out.hidden_states[0]),
        ("residual stream after layer 0", out.hidden_states[1]),
        ("logits", out.logits),
    ):
        rms = math.sqrt(value.double().pow(2).mean())
        np.testing.assert_allclose(one[name][0], rms, rtol=1e-5)
    change = one["change of the logits"]
    assert change[0] == 0 < change[1] < change[2]


@pytest.mark.slow
def test_mup_is_flat_where_the_standard_parametrization_is_not(
    tiny: Tiny, tmp_path: Path, capsys: Any
) -> None:
    config = json.loads(tiny.config.read_text()) | {"initializer_range": 0.15}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = flags(
        tiny,
        out=tmp_path / "out",
        **{
            "model.config": tmp_path / "config.json",
            "optimizer.learning-rate": 1e-2,
        },
    )
    command += ["--widths", "64", "128", "256", "--model.mup-zero-head", "--compare"]
    assert main(command) == 0
    assert "standard: not flat: " in capsys.readouterr().out
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / JSON).read_text())["parametrizations"]
    last = {
        parametrization: {name: values["slope"][-1] for name, values in by_name.items()}
        for parametrization, by_name in written.items()
    }
    # the narrow models of this test are far from the limit of muP: see docs/mup.md for how flat it is
    steepest = {name: max(map(abs, slopes.values())) for name, slopes in last.items()}
    assert steepest["mup"] <= steepest["standard"] / 8, last


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, ["--widths", "64"], "widths: found 64, expected two or more that differ"),
        ({}, ["--widths", "64", "64"], "widths: found 64 64, expected two or more that differ"),
        ({}, ["--widths", "64", "50"], "model.width: found 50, but num_attention_heads of"),
        ({}, ["--widths", "0", "64"], "--widths: "),
        ({}, ["--seeds", "0"], "--seeds: "),
        ({"model.width": 64}, [], "model.width: found 64: name it in --widths"),
        ({"model.init-from": "x"}, [], "model.init-from: found x: models begin with random weights"),
        ({"optimizer.name": "sgd"}, [], "optimizer.name: found sgd with --model.parametrization mup"),
        ({"out": "s3://b/x"}, [], "out: s3://b/x is remote"),
        ({"model.mup-base-heads": 3}, [], "model.mup-base-kv-heads: found none"),
    ],
)  # fmt: skip
def test_commands_that_are_wrong(
    changes: dict[str, Any], more: list[str], message: str, tiny: Tiny, tmp_path: Path, capsys: Any
) -> None:
    assert main([*flags(tiny, **{"out": tmp_path / "out"} | changes), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_widths_in_proportion() -> None:
    config = LlamaConfig.from_dict(CONFIG)
    more_heads = with_width(config, 64, "x")
    wider_heads = with_width(config, 64, "x", wider_heads=True)
    for scaled, heads in ((more_heads, (8, 4, 8)), (wider_heads, (4, 2, 16))):
        assert (scaled.hidden_size, scaled.intermediate_size) == (64, 96)
        assert (scaled.num_attention_heads, scaled.kv_heads, scaled.head_size) == heads
    with pytest.raises(ValueError, match="head_dim of x, 8 x 36 / 32, is not an even number"):
        with_width(config, 36, "x", wider_heads=True)
