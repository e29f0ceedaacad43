"""The backward pass of all three programs in step: every parameter's gradient, compared as it is formed."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from parity_tests.report.metrics import Compared, compare
from parity_tests.report.programs.checkpoint import EMBEDDING
from parity_tests.report.programs.program import Program


def backward(
    programs: Sequence[Program],
    ids: np.ndarray,
    layers: int,
    dtype: torch.dtype,
    unit: float,
    advance: Callable[[], None],
) -> list[Compared]:
    """Gradients of the loss for every parameter, in backward order: the first to drift comes first.

    Every layer is given the same by all three: the oracle's activations and the oracle's cotangent, rounded
    to `dtype`. What is compared is thus the error of each layer's own vector-Jacobian product. Propagated
    through all layers instead, the error is decided by luck: at a token that takes nearly all attention a
    norm's gradient is the small difference of large terms, and one rounding there is the error of every
    gradient below (in bfloat16, that of the real checkpoint's embedding was 0.9, 1.0, 1.7 and 3.5 of the
    gradient itself in programs that round alike, but not at the same places).
    """
    *_, oracle = programs
    compared: list[Compared] = []

    def add(name: str, gradients: Sequence[torch.Tensor]) -> None:
        compared.append(compare(name, *gradients, unit=unit, rows=1))

    def rounded(states: torch.Tensor) -> torch.Tensor:
        return oracle.as_torch(states).to(dtype)

    states, inputs = oracle.embed(ids), []
    for layer in range(layers):
        inputs.append(rounded(states))
        states = oracle.layer(layer, states)[1]
        advance()
    heads = [program.head_vjp(program.given(rounded(states)), ids) for program in programs]
    cotangent, tied = rounded(heads[-1][0]), EMBEDDING in heads[0][1]
    for name in reversed(list(heads[0][1])):
        if name != EMBEDDING:
            add(name, [gradients[name] for _, gradients in heads])
    advance()
    for layer in reversed(range(layers)):
        given = inputs.pop(), cotangent
        parts = [program.layer_vjp(layer, *map(program.given, given)) for program in programs]
        cotangent = rounded(parts[-1][0])
        for name in _BACKWARD:
            for leaf in (f"{name}.bias", f"{name}.weight"):
                if leaf in parts[0][1]:
                    add(f"model.layers.{layer}.{leaf}", [gradients[leaf] for _, gradients in parts])
        advance()
    embeddings = [
        program.embed_vjp(ids, program.given(cotangent), gradients[EMBEDDING] if tied else None)
        for program, (_, gradients) in zip(programs, heads, strict=True)
    ]
    add(EMBEDDING, embeddings)
    return compared


# The modules of a layer in the order in which a backward pass reaches them.
_BACKWARD = (
    *("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj", "post_attention_layernorm"),
    *("self_attn.o_proj", "self_attn.v_proj", "self_attn.k_proj", "self_attn.q_proj"),
    "input_layernorm",
)
