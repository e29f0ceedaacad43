"""Estimate the time and memory of a report before it starts."""

import os
import time
from typing import NamedTuple

import numpy as np
import torch

from llama_jax import LlamaConfig


class Estimate(NamedTuple):
    seconds: float
    bytes: int


def estimate(config: LlamaConfig, length: int, backward_length: int, itemsize: int) -> Estimate:
    """From the FLOPs of the three programs' matmuls, at this machine's speed.

    Args:
        length, backward_length: tokens of the forward and of the backward pass.
        itemsize: bytes of the computation's dtype.
    """
    forward, short_forward = _flops(config, length), _flops(config, backward_length)
    float32, float64 = _flops_per_second(torch.float32), _flops_per_second(torch.float64)
    # The backward pass: forward again and twice as much back, by all; once more forward by the oracle.
    matmul_seconds = forward * (2 / float32 + 1 / float64)
    matmul_seconds += short_forward * (6 / float32 + 4 / float64)
    # norms, softmax, comparisons and compilation take about as long again
    seconds = 10 + 2 * matmul_seconds
    layer, embedding = _parameters(config)
    while_in_layer = layer * (2 * itemsize + 8) + 40 * length * config.intermediate_size
    logits = 3 * length * config.vocab_size * itemsize
    while_in_head = 3 * embedding * itemsize + logits
    while_in_head_vjp = (
        40 * backward_length * config.vocab_size + 24 * embedding if backward_length else 0
    )
    layer_inputs = itemsize * config.num_hidden_layers * backward_length * config.hidden_size
    peak = max(while_in_layer, while_in_head, while_in_head_vjp) + layer_inputs + 1_000_000_000
    return Estimate(seconds, peak * 3 // 2)  # allocators keep some of what was freed; measured


def total_memory() -> int:
    """Bytes of RAM that this machine has, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def model_bytes(config: LlamaConfig, itemsize: int) -> int:
    """Bytes of all weights."""
    layer, embedding = _parameters(config)
    count = 1 if config.tie_word_embeddings else 2
    return (config.num_hidden_layers * layer + count * embedding) * itemsize


def _parameters(config: LlamaConfig) -> tuple[int, int]:
    """Of one layer's matrices, and of the embedding."""
    heads = (config.num_attention_heads + config.kv_heads) * config.head_size
    layer = 2 * config.hidden_size * heads + 3 * config.hidden_size * config.intermediate_size
    return layer, config.vocab_size * config.hidden_size


def _flops(config: LlamaConfig, length: int) -> float:
    """Of the matmuls of one forward pass: with weights, and half of the square of attention scores."""
    layer, embedding = _parameters(config)
    scores = length * config.num_attention_heads * config.head_size
    return 2.0 * length * (config.num_hidden_layers * (layer + scores) + embedding)


def _flops_per_second(dtype: torch.dtype) -> float:
    """Of a matmul; takes some milliseconds to measure."""
    size, rounds = 512, 4
    a = torch.from_numpy(np.random.default_rng(0).normal(size=(size, size))).to(dtype)
    a @ a
    begin = time.perf_counter()
    for _ in range(rounds):
        a @ a
    return rounds * 2 * size**3 / (time.perf_counter() - begin)
