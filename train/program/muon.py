"""Muon's direction: the momentum of a matrix, orthogonalised (Keller Jordan et al., 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# of the quintic a x + b x^3 + c x^5, whose slope at 0 is steep
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def scale_by_muon(beta: float, eps: float) -> optax.GradientTransformation:
    """Nesterov's momentum of each matrix [out, in], orthogonalised, times 0.2 * sqrt(max(out, in)).

    The scale is that of arXiv:2502.16982, with which the learning rates and decay of AdamW suit it. As
    there and in Keller Jordan's own program, the momentum has no correction for its start from 0.

    Args:
        beta: of the momentum.
        eps: added to the norm by which the momentum is divided.
    """

    def init(params: Any) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def mean(momentum: Array, gradient: Array) -> Array:
            return beta * momentum + (1 - beta) * gradient

        def direction(momentum: Array, gradient: Array) -> Array:
            scale = 0.2 * max(gradient.shape) ** 0.5
            return scale * orthogonalise(mean(momentum, gradient), eps)

        momentum = jax.tree.map(mean, state.trace, gradients)
        return jax.tree.map(direction, momentum, gradients), optax.TraceState(momentum)

    return optax.GradientTransformation(init, update)


def orthogonalise(matrix: Float[Array, "out in"], eps: float) -> Float[Array, "out in"]:
    """Near to U V^T, where the matrix is U S V^T, by Newton and Schulz's iteration.

    Five steps leave singular values of about 0.7 to 1.2 in place of 1, which training does not mind.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + eps)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x
