"""Muon: the orthogonalized momentum of each matrix (Keller Jordan et al., 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# a, b, c of the quintic a x + b x^3 + c x^5, which is steep at 0
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def scale_by_muon(beta: float, eps: float) -> optax.GradientTransformation:
    """Orthogonalized Nesterov momentum of each matrix [out, in], times 0.2 * sqrt(max(out, in)).

    The scale is that of arXiv:2502.16982, which makes AdamW's learning rates and weight decay carry over.
    As there and in the reference implementation (github.com/KellerJordan/Muon), the momentum has no bias
    correction.

    Args:
        beta: the momentum.
        eps: added to the norm by which the momentum is divided.
    """

    def init(params: Any) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def mean(momentum: Array, gradient: Array) -> Array:
            return beta * momentum + (1 - beta) * gradient

        def direction(momentum: Array, gradient: Array) -> Array:
            scale = 0.2 * max(gradient.shape) ** 0.5
            return scale * orthogonalize(mean(momentum, gradient), eps)

        momentum = jax.tree.map(mean, state.trace, gradients)
        return jax.tree.map(direction, momentum, gradients), optax.TraceState(momentum)

    return optax.GradientTransformation(init, update)


def orthogonalize(matrix: Float[Array, "out in"], eps: float) -> Float[Array, "out in"]:
    """Approximately U V^T of the matrix U S V^T, by Newton-Schulz iteration.

    Five iterations leave singular values between about 0.7 and 1.2 instead of 1, which is enough to train.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + eps)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x
