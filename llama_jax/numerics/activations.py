"""The activations of the gated MLP, by the names of transformers' `ACT2FN`.

`prelu` and `xielu` are missing: they have parameters, which a Llama checkpoint does not store.
"""

from collections.abc import Callable
from math import pi, sqrt

import jax
import jax.numpy as jnp

from llama_jax.numerics.matmul import working_dtype

Activation = Callable[[jax.Array], jax.Array]


def _silu(x: jax.Array) -> jax.Array:
    """Rounded once, as PyTorch's is; XLA's exponential of bfloat16 is also slow on a CPU."""
    return jax.nn.silu(x.astype(working_dtype(x.dtype))).astype(x.dtype)


def _gelu_accurate(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jnp.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


def _laplace(x: jax.Array) -> jax.Array:
    mu, sigma = (
        0.707107,
        0.282095,
    )  # the constants of MEGA (arXiv:2209.10655), as transformers rounds them
    return 0.5 * (1 + jax.lax.erf((x - mu) / (sigma * sqrt(2.0))))


def _gelu_exact(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_fast(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


ACTIVATIONS: dict[str, Activation] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu_exact,
    "gelu_python": _gelu_exact,
    "gelu_new": _gelu_accurate,
    "gelu_accurate": _gelu_accurate,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "gelu_10": lambda x: jnp.clip(_gelu_exact(x), -10, 10),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, negative_slope=0.01),
    "hardswish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "laplace": _laplace,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "linear": lambda x: x,
}
