"""Continued training on chats: the loss is that of torch on the assistant's tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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


def test_batches_without_a_token_in_the_loss(tmp_path: Path, capfd: Any) -> None:
    """A mask of zeros, as transformers makes of a template without marks, is not learned from silently."""
    tokenizer = make_tokenizer(tmp_path / "t", None)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 304}))
    flags = [f"--model.config={tmp_path}", f"--tokens.tokenizer={tokenizer}", "--steps=4"]
    flags += ["--batch-size=1", "--sequence-length=8", "--evaluation.every=0"]

    def error_with(name: str, masks: list[list[int]]) -> str:
        ids = [[5] * 8 for _ in masks]
        table = pa.table({"input_ids": ids, "assistant_masks": masks})
        path = tmp_path / f"{name}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        capfd.readouterr()
        assert main(["run", *flags, f"--data={path}", f"--out={tmp_path / name}"]) == 2
        return capfd.readouterr().err.splitlines()[-1]

    assert error_with("none", [[0] * 8] * 4) == (
        f"error: {tmp_path}/none.arrow: none of its tokens is in the loss: if these are chats, the "
        "template must mark what the assistant says with {% generation %} when they are tokenized, or use "
        "`tokenize --chat`"
    )
    assert not (tmp_path / "none").exists()
    message = error_with("few", [[0] * 8] * 20 + [[1] * 8])
    assert re.fullmatch(
        r"error: step \d: its batch has no token in the loss: begin again with a larger --batch-size or "
        "--sequence-length, or with data of which more is in the loss",
        message,
    )


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
