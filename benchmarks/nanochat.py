"""nanochat's model and training loop, written for this benchmark with the defaults of its run on a CPU.

github.com/karpathy/nanochat (October 2025): rotary positions, normalized queries and keys, relu^2, no
weights in norms, untied embedding and head, logits capped at 15; Muon for matrices and AdamW for embedding
and head; a constant learning rate that falls to 0 in the last fifth. Its script for CPUs trains 4 layers of
width 256 on one row of 1024 tokens a step.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from llama_jax.loss import IGNORE_INDEX

SEQUENCE, LAYERS, WIDTH, HEADS = 1024, 4, 256, 2
SOFTCAP = 15.0
MATRIX_RATE, EMBEDDING_RATE, HEAD_RATE = 0.02, 0.2, 0.004
WARMDOWN = 0.2  # of the time
MOMENTUM_STEPS = 300  # in which Muon's momentum rises from 0.85 to 0.95

Rows = tuple[np.ndarray, np.ndarray]  # input ids and labels, each [rows, SEQUENCE]


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """The residual stream [rows, seq, width] after this layer."""
        rows, seq, _ = x.shape
        query, key, value = (
            linear(norm(x)).view(rows, seq, HEADS, -1).transpose(1, 2) for linear in self.qkv
        )
        query, key = norm(rotated(query, rotation)), norm(rotated(key, rotation))
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(rows, seq, WIDTH))
        return x + self.down(functional.relu(self.up(norm(x))).square())


class Nanochat(nn.Module):
    """The model; called with ids and labels, the summed loss."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        half = WIDTH // HEADS // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(SEQUENCE), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                outputs, inputs = module.weight.shape
                std = inputs**-0.5 * min(1.0, (outputs / inputs) ** 0.5)
                nn.init.normal_(module.weight, std=std)
        for name, weight in self.named_parameters():
            if name.startswith("head") or ".out." in name or ".down." in name:
                nn.init.zeros_(weight)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy, summed over the labels that are not IGNORE_INDEX."""
        x = norm(self.embedding(ids))
        for block in self.blocks:
            x = block(x, (self.cos, self.sin))
        logits = SOFTCAP * torch.tanh(self.head(norm(x)) / SOFTCAP)
        return functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )


class Result(NamedTuple):
    """What `train` did."""

    parameters: int
    steps: int
    processor_seconds: float
    model: Nanochat
    compiled: bool


def norm(x: Tensor) -> Tensor:
    """RMS norm without weights."""
    return functional.rms_norm(x, (x.shape[-1],))


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions of [rows, heads, seq, dim], halves of the dimension in pairs."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def train(rows: Iterator[Rows], vocab_size: int, seconds: float) -> Result:
    """Train a model for so long; one row a step."""
    torch.manual_seed(0)
    model = Nanochat(vocab_size)
    scale = (WIDTH / 768) ** -0.5
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": [model.head.weight], "lr": HEAD_RATE * scale},
                {"params": [model.embedding.weight], "lr": EMBEDDING_RATE * scale},
            ],
            betas=(0.8, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            fused=True,
        ),
        torch.optim.Muon(model.blocks.parameters(), lr=MATRIX_RATE, weight_decay=0.0),
    ]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    loss, compiled = fastest_loss(model, *tensors(next(rows)))
    begin, processor, step = time.perf_counter(), time.process_time(), 0
    while (progress := (time.perf_counter() - begin) / seconds) < 1:
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * min(1.0, (1 - progress) / WARMDOWN)
                if "momentum" in group:
                    group["momentum"] = 0.85 + 0.1 * min(step / MOMENTUM_STEPS, 1.0)
        ids, labels = tensors(next(rows))
        mean = loss(ids, labels) / (labels != IGNORE_INDEX).sum()
        mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
    processor = time.process_time() - processor
    return Result(sum(p.numel() for p in model.parameters()), step, processor, model, compiled)


def fastest_loss(
    model: Nanochat, ids: Tensor, labels: Tensor
) -> tuple[Callable[[Tensor, Tensor], Tensor], bool]:
    """The model under `torch.compile`, already compiled, and True; itself where that is not possible."""
    program = torch.compile(model, dynamic=False)
    try:
        program(ids, labels).backward()
    except Exception:  # no C++ compiler, or an unsuitable one
        return model, False
    finally:
        model.zero_grad(set_to_none=True)
    return program, True


@torch.no_grad()
def validation_loss(model: Nanochat, rows: Iterator[Rows]) -> tuple[float, int]:
    """The loss per token, and of how many tokens."""
    total, count = 0.0, 0
    for batch in rows:
        ids, labels = tensors(batch)
        total += float(model(ids, labels))
        count += int((labels != IGNORE_INDEX).sum())
    return total / count, count


def tensors(rows: Rows) -> tuple[Tensor, Tensor]:
    """Ids and labels as int64."""
    ids, labels = (torch.from_numpy(array.astype(np.int64)) for array in rows)
    return ids, labels
