"""Validation losses by source, and bits per byte, as torch's logits and the texts themselves say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import llama_jax
from parity_tests.train.corpus import documents_of, write_lines
from parity_tests.train.data.test_chat import make_tokenizer
from parity_tests.train.runs import CONFIG
from train.__main__ import main
from train.data.token_directory import TokenDirectory
from train.data.token_shards import open_tokens
from train.model.evaluate import source_names
from train.model.sample import sample_text
from train.monitoring.metrics_log import read_metrics

LENGTH = 512  # every source is one window


@pytest.mark.slow
def test_bits_per_byte_and_losses_by_source(tmp_path: Path, capfd: Any) -> None:
    model = make_tokenizer(tmp_path / "model", None)
    config = CONFIG | {"vocab_size": 304, "max_position_embeddings": LENGTH, "eos_token_id": 1}
    (model / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**config)).eval()
    reference.save_pretrained(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    totals = []
    for name, texts in (
        ("english", [f"Hello, {number} assistants and you." for number in range(12)]),
        ("other", ["Grüße, Welt", "日本語 🙂", "x", "user user user"] * 2 + ["y"]),
    ):
        source = write_lines(tmp_path / f"{name}.jsonl", texts)
        command = [
            "tokenize",
            str(source),
            "--tokenizer",
            str(model),
            "--out",
            str(tmp_path / name),
        ]
        assert main([*command, "--validation-fraction=0.6"]) == 0
        nats, count, size = 0.0, 0, 0
        for ids in documents_of(open_tokens(tmp_path / name, "validation")):
            with torch.no_grad():
                logits = reference(torch.tensor([ids])).logits[0, :-1].double()
            labels = torch.tensor(ids[1:])
            nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
            # pieces of a byte-level tokenizer have a character for each byte
            pieces = [tokenizer.id_to_token(token) for token in ids]
            assert pieces[-1] == "</s>"
            size += sum(len(piece) for piece in pieces[1:-1])
            text = tokenizer.decode(ids)
            assert sum(len(piece) for piece in pieces[:-1]) == len(text.encode())
        totals.append((nats, count, size))
    totals.append(tuple(np.sum(totals, axis=0)))
    expected = [(nats / count, nats / math.log(2) / size) for nats, count, size in totals]

    run = tmp_path / "run"
    flags = [f"--model.init-from={model}", f"--out={run}", "--steps=1", "--evaluation.batches=1"]
    flags += ["--batch-size=1", f"--sequence-length={LENGTH}", "--optimizer.learning-rate=0"]
    flags += ["--data", str(tmp_path / "english"), f"{tmp_path / 'other'}=3"]
    flags += ["--evaluation.sample-tokens=0", "--optimizer.warmup-steps=0"]
    assert main(["run", *flags]) == 0
    (line,) = [line for line in read_metrics(run) if "validation_loss" in line]
    for suffix, values in zip(("/english", "/other", ""), expected, strict=True):
        actual = line[f"validation_loss{suffix}"], line[f"bits_per_byte{suffix}"]
        np.testing.assert_allclose(actual, values, rtol=1e-5)
    assert line["validation_tokens"] == totals[2][1]
    capfd.readouterr()
    assert main(["eval", str(run)]) == 0
    printed = [text.split() for text in capfd.readouterr().out.splitlines()]
    assert [words[-1] for words in printed[1:]] == ["english", "other"]
    for words, values in zip([*printed[1:], printed[0]], expected, strict=True):
        bits = words[words.index("byte") + 1]
        np.testing.assert_allclose([float(words[1]), float(bits)], values, rtol=1e-4)
    assert main(["export", str(run), str(tmp_path / "hf"), "--verify"]) == 0


def test_sources_of_one_name(tmp_path: Path) -> None:
    paths = ["a/tokens", "b/tokens", "tokens-2", "c/tokens"]
    names = source_names([TokenDirectory(tmp_path / path) for path in paths])
    assert names == ["tokens", "tokens-2", "tokens-2-2", "tokens-3"]


def test_samples(tmp_path: Path) -> None:
    """Greedy ones are torch's; drawn ones repeat, and become greedy as the temperature falls."""
    model = make_tokenizer(tmp_path, None)
    config = CONFIG | {"vocab_size": 304, "eos_token_id": 1}
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.5)).eval()
    reference.save_pretrained(model)
    ours = llama_jax.LlamaForCausalLM.from_pretrained(model)

    def sample(temperature: float) -> str:
        return sample_text(ours, model, "Hello", 12, temperature=temperature)

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("Hello", add_special_tokens=False).ids])
    greedy = reference.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    assert sample(0.0) == tokenizer.decode(greedy)
    assert sample(1e-6) == sample(0.0)
    assert sample(2.0) == sample(2.0) != sample(0.0)
