"""What a report will cost: time and memory, before it begins."""

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
    """From the products of the three programs, the larger part of it all, at this machine's speed."""
    forward, part = _flops(config, length), _flops(config, backward_length)
    narrow, wide = _speed(torch.float32), _speed(torch.float64)
    # of the backward pass: forward again and two products back, by all; forward once more, by the oracle
    products = forward * (2 / narrow + 1 / wide) + part * (6 / narrow + 4 / wide)
    # norms, softmax, comparisons and compilation take about as long again
    seconds = 10 + 2 * products
    layer, ends = _parameters(config)
    hidden, states = config.hidden_size, config.num_hidden_layers * backward_length
    logits = 3 * length * config.vocab_size * itemsize
    of_head = 40 * backward_length * config.vocab_size + 24 * ends if backward_length else 0
    working = max(
        layer * (2 * itemsize + 8) + 40 * length * config.intermediate_size,
        3 * ends * itemsize + logits,
        of_head,
    )
    held = 1_000_000_000 + working + itemsize * states * hidden
    return Estimate(seconds, held * 3 // 2)  # allocators keep what they were given back; measured


def total_memory() -> int:
    """Bytes of RAM that this machine has, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def model_bytes(config: LlamaConfig, itemsize: int) -> int:
    layer, ends = _parameters(config)
    heads = 1 if config.tie_word_embeddings else 2
    return (config.num_hidden_layers * layer + heads * ends) * itemsize


def _parameters(config: LlamaConfig) -> tuple[int, int]:
    """Of one layer's products, and of the embedding."""
    heads = (config.num_attention_heads + config.kv_heads) * config.head_size
    layer = 2 * config.hidden_size * heads + 3 * config.hidden_size * config.intermediate_size
    return layer, config.vocab_size * config.hidden_size


def _flops(config: LlamaConfig, length: int) -> float:
    """Of one forward pass: products with weights, and half of the attention's square."""
    layer, ends = _parameters(config)
    square = length * config.num_attention_heads * config.head_size
    return 2.0 * length * (config.num_hidden_layers * (layer + square) + ends)


def _speed(dtype: torch.dtype) -> float:
    """Products a second, measured in some milliseconds."""
    a = torch.from_numpy(np.random.default_rng(0).normal(size=(512, 512))).to(dtype)
    a @ a
    begin = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 512**3 / (time.perf_counter() - begin)
