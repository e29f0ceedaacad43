"""The peer of the pretraining benchmark learns, and both programs are evaluated on the same tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import nanochat, pretraining
from llama_jax.loss import IGNORE_INDEX
from parity_tests.train.runs import VOCAB, make_tiny
from train.data.sources import find_sources
from train.options import ModelOptions, RunOptions


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SEQUENCE": 32, "WIDTH": 64, "LAYERS": 2}.items():
        monkeypatch.setattr(nanochat, name, value)
    # compiling takes half a minute
    monkeypatch.setattr(nanochat, "fastest_loss", lambda model, ids, labels: (model, False))


def test_both_are_evaluated_on_the_same_tokens(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    options = RunOptions(
        data=(str(tiny.data),),
        steps=2,
        batch_size=2,
        sequence_length=16,
        model=ModelOptions(config=tiny.config, compute_dtype="float32"),
    )
    sources = find_sources(options.data, options.tokens, None)
    ours, num_bytes = pretraining.train_ours(options, sources)
    peer = pretraining.train_nanochat(options, sources, seconds=2.0)
    # every token but the first of each of the 40 documents
    assert ours.num_tokens == peer.num_tokens == len(sources[0].open("validation")) - 40
    # each token determines the next, but for a document's end
    assert peer.loss < math.log(VOCAB) / 2 < ours.loss
    report = pretraining.tabulate([ours, peer], num_bytes)
    assert [row[0] for row in report.rows] == ["ours", "nanochat, torch eager"]
    bits = peer.loss * peer.num_tokens / num_bytes / math.log(2)
    assert report.rows[1][-2:] == [f"{peer.loss:.3f}", f"{bits:.3f}"]


def test_a_prediction_sees_no_later_token() -> None:
    torch.manual_seed(0)
    model = nanochat.Nanochat(VOCAB)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # nothing that is 0, as at the start
    ids = torch.randint(VOCAB, (1, 32))
    later = torch.where(torch.arange(32) < 20, ids, (ids + 1) % VOCAB)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, :20] = 7
    torch.testing.assert_close(model(ids, labels), model(later, labels))
    labels[0, 20] = 7
    assert abs(model(ids, labels) - model(later, labels)) > 1e-3
