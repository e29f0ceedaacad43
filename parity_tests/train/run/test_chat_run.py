"""Continued training on chats: the loss is that of torch on the assistant's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parity_tests.train.data.test_chat import (
    CHATS,
    TEMPLATES,
    expected,
    make_tokenizer,
    write_chats,
)
from parity_tests.train.runs import CONFIG
from train.__main__ import main
from train.monitoring.metrics_log import read_metrics


def test_continued_training_on_chats(tmp_path: Path, capfd: Any) -> None:
    model = make_tokenizer(tmp_path / "model", TEMPLATES["chatml"])
    config = CONFIG | {"vocab_size": 304, "max_position_embeddings": 256}
    (model / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**config)).eval()
    reference.save_pretrained(model)
    source = write_chats(tmp_path / "a.jsonl", CHATS)
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    command = ["tokenize", str(source), "--chat", "--tokenizer", str(model), "--out", str(tokens)]
    assert main([*command, "--validation-fraction=0"]) == 0
    flags = [f"--model.init-from={model}", f"--data={tokens}", f"--out={run}", "--steps=1"]
    flags += ["--batch-size=1", "--sequence-length=256", "--evaluation.every=0"]
    capfd.readouterr()
    assert main(["run", *flags]) == 0
    assert "warning" not in capfd.readouterr().err
    (line,) = read_metrics(run)
    total, count = 0.0, 0
    for chat in CHATS:
        ids, mask = expected(model, TEMPLATES["chatml"], chat)
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0, :-1].double()
        labels = torch.tensor([i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    assert line["num_tokens"] == count
    np.testing.assert_allclose(line["loss"], total / count, rtol=1e-5)
    capfd.readouterr()
    assert main(["export", str(run), str(tmp_path / "hf"), "--with-optimizer"]) == 2
    assert "was made with tokenize --chat" in capfd.readouterr().err
