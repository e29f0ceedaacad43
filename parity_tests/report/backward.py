"""The backward pass of all three programs in step: every parameter's gradient, compared as it is formed."""

from collections.abc import Callable, Sequence

import numpy as np

from parity_tests.report.forward import forward
from parity_tests.report.metrics import Compared, compare
from parity_tests.report.program import Program
from parity_tests.report.streamed import EMBEDDING


def backward(
    programs: Sequence[Program],
    ids: np.ndarray,
    layers: int,
    unit: float,
    advance: Callable[[], None],
) -> list[Compared]:
    """Gradients of the loss for every parameter, in backward order: the first to drift comes first.

    Each program propagates its own cotangents through its own activations: a forward pass keeps every
    layer's input, and each layer is run again for its vector-Jacobian product.
    """
    compared: list[Compared] = []

    def add(name: str, gradients: Sequence) -> None:
        compared.append(compare(name, *gradients, unit=unit, rows=1))

    inputs = forward(programs, ids, layers, unit, advance, keep_inputs=True).inputs
    cotangents, heads = [], []
    for program, kept in zip(programs, inputs, strict=True):
        cotangent, gradients = program.head_vjp(kept.pop(), ids)
        cotangents.append(cotangent)
        heads.append(gradients)
    advance()
    tied = EMBEDDING in heads[0]
    for name in reversed(list(heads[0])):
        if name != EMBEDDING:
            add(name, [gradients[name] for gradients in heads])
    for layer in reversed(range(layers)):
        parts = []
        for index, program in enumerate(programs):
            cotangents[index], gradients = program.layer_vjp(
                layer, inputs[index].pop(), cotangents[index]
            )
            parts.append(gradients)
        for name in _BACKWARD:
            for leaf in (f"{name}.bias", f"{name}.weight"):
                if leaf in parts[0]:
                    add(f"model.layers.{layer}.{leaf}", [gradients[leaf] for gradients in parts])
        advance()
    embeddings = [
        program.embed_vjp(ids, cotangent, gradients[EMBEDDING] if tied else None)
        for program, cotangent, gradients in zip(programs, cotangents, heads, strict=True)
    ]
    add(EMBEDDING, embeddings)
    return compared


# The modules of a layer in the order in which a backward pass reaches them.
_BACKWARD = (
    *("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj", "post_attention_layernorm"),
    *("self_attn.o_proj", "self_attn.v_proj", "self_attn.k_proj", "self_attn.q_proj"),
    "input_layernorm",
)
