"""The backward pass of all three programs in step: every gradient is compared as it is computed."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from parity_tests.report.measure.errors import compare
from parity_tests.report.measure.metrics import Comparison
from parity_tests.report.programs.checkpoint import EMBEDDING
from parity_tests.report.programs.program import Programs
from parity_tests.report.programs.steps import OUTPUT


def backward(
    programs: Programs,
    ids: np.ndarray,
    layers: int,
    dtype: torch.dtype,
    eps: float,
    advance: Callable[[], None],
) -> list[Comparison]:
    """Gradients of the loss for every parameter, in backward order: the first to drift comes first.

    All three programs are given the same inputs at every layer: the oracle's hidden states and the oracle's
    cotangent, rounded to `dtype`. What is compared is thus the error of each layer's own vector-Jacobian
    product. If errors were propagated through all layers instead, chance would decide: at a token that
    takes nearly all attention a norm's gradient is the small difference of large terms, and one rounding
    there is the error of every gradient below (in bfloat16, that of the real checkpoint's embedding was
    0.9, 1.0, 1.7 and 3.5 of the gradient itself in programs that round alike, but at different points).

    Args:
        ids: int64 [1, T].
        eps: spacing of `dtype` at 1.
        advance: called after every layer, twice in all.
    """
    comparisons: list[Comparison] = []

    def add(name: str, gradients: list[Tensor]) -> None:
        comparisons.append(compare(name, *gradients, eps=eps, rows=1))

    hidden, inputs = programs.oracle.embed(ids), []
    for layer in range(layers):
        inputs.append(hidden.to(dtype))
        hidden = programs.oracle.layer(layer, hidden)[OUTPUT]
        advance()
    hidden = hidden.to(dtype)
    cotangents, head_gradients = zip(*(p.head_vjp(hidden, ids) for p in programs), strict=True)
    cotangent = cotangents[-1].to(dtype)
    for name in reversed(list(head_gradients[0])):
        if name != EMBEDDING:
            add(name, [gradients[name] for gradients in head_gradients])
    advance()
    for layer in reversed(range(layers)):
        hidden = inputs.pop()
        results = [program.layer_vjp(layer, hidden, cotangent) for program in programs]
        cotangents, gradients = zip(*results, strict=True)
        cotangent = cotangents[-1].to(dtype)
        for name in _in_backward_order(gradients[0]):
            add(f"model.layers.{layer}.{name}", [of_program[name] for of_program in gradients])
        advance()
    embedding = []
    for program, of_head in zip(programs, head_gradients, strict=True):
        gradient = program.embed_vjp(ids, cotangent)
        if EMBEDDING in of_head:  # tied: it is the head's weight too
            gradient = gradient + of_head.pop(EMBEDDING)  # both are large
        embedding.append(gradient)
    add(EMBEDDING, embedding)
    return comparisons


# The modules of a layer in the order in which a backward pass reaches them.
_BACKWARD = (
    *("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj", "post_attention_layernorm"),
    *("self_attn.o_proj", "self_attn.v_proj", "self_attn.k_proj", "self_attn.q_proj"),
    "input_layernorm",
)


def _in_backward_order(gradients: Mapping[str, Tensor]) -> list[str]:
    names = (f"{module}.{leaf}" for module in _BACKWARD for leaf in ("bias", "weight"))
    return [name for name in names if name in gradients]
