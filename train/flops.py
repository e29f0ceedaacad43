"""Floating-point operations: of any traced program, counted, and of a training step, by formula."""

import math
from typing import Any

from llama_jax.config import LlamaConfig


def product_flops(jaxpr: Any) -> int:
    """Flops of every matrix product in a jaxpr, scans multiplied out; the dearest branch of a cond.

    A `while` whose trip count nobody knows counts once.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
        elif equation.primitive.name == "cond":
            total += max(product_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            # the first is the program itself; others are rules of its derivatives
            inner = [
                getattr(value, "jaxpr", value)
                for value in equation.params.values()
                if hasattr(getattr(value, "jaxpr", value), "eqns")
            ]
            total += times * sum(map(product_flops, inner[:1]))
    return total


def training_flops_per_token(config: LlamaConfig, sequence_length: int) -> int:
    """6 N + 6 L S A flops a token, forward and backward: model FLOPs, as in PaLM (arXiv:2204.02311, B).

    N counts the weights that multiply (projections, MLP and head; not norms or the embedding lookup), A is
    heads * head size. Attention is counted causally: 2 L S A per token of the forward pass, half of what
    a full [S, S] product takes. Recomputation does not count.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_size
    kv_heads = config.kv_heads * config.head_size
    attention = hidden * heads * 2 + hidden * kv_heads * 2
    layer = attention + 3 * hidden * config.intermediate_size
    weights = config.num_hidden_layers * layer + hidden * config.vocab_size
    return 6 * weights + 6 * config.num_hidden_layers * sequence_length * heads
