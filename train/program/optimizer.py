"""Optimizers by name: a direction of optax's or our own, decoupled decay, and a clip by global norm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array, Float

from llama_jax.numerics.matmul import working_dtype
from train.options import Optimizer
from train.program.muon import scale_by_muon
from train.program.per_layer import is_stacked, per_layer


class Direction(NamedTuple):
    """What is particular to an optimizer.

    uses: which of `beta1`, `beta2` and `eps` it has.
    make: a transformation, from these, of gradients to what the learning rate multiplies. It has neither
        learning rate nor decay, and sees each layer's parameters by themselves.
    """

    uses: tuple[str, ...]
    make: Callable[..., optax.GradientTransformation]


def _adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(beta1, beta2, eps)


def _muon(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, AdamW's direction for all else, as its authors have it."""

    def share(path: tuple[Any, ...], leaf: Any) -> str:
        return "muon" if is_stacked(path) and leaf.ndim == 2 else "adam"

    return optax.partition(
        {"muon": scale_by_muon(beta1, eps), "adam": _adam(beta1, beta2, eps)},
        lambda params: jax.tree_util.tree_map_with_path(share, params),
    )


def _adafactor() -> optax.GradientTransformation:
    """Of arXiv:1804.04235, algorithm 4, as T5 and optax have it: no momentum, eps of its own.

    beta2 is 1 - step^-0.8; the update's root mean square is at most 1, and is multiplied by the
    parameter's, which counts as 0.001 at least.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


DIRECTIONS: dict[str, Direction] = {
    "adamw": Direction(("beta1", "beta2", "eps"), _adam),
    "muon": Direction(("beta1", "beta2", "eps"), _muon),
    "lion": Direction(("beta1", "beta2"), lambda beta1, beta2: optax.scale_by_lion(beta1, beta2)),
    "adafactor": Direction((), _adafactor),
    "sgd": Direction(("beta1",), lambda beta1: optax.trace(beta1)),
}


def decay_mask(params: Any) -> Any:
    """True for the weight matrices, embedding and head included; False for norms and biases."""

    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        name = keystr(path, simple=True, separator=".")
        return not name.endswith("bias") and "norm" not in name

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(
    name: Optimizer,
    learning_rate: float | Callable[..., Any],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then p -= learning_rate * (direction + weight_decay * p).

    The decay is decoupled (arXiv:1711.05101) and of what `decay_mask` names. Stacked layers move as if
    each were a parameter of its own; the clip is of the whole tree.

    Args:
        beta1, beta2, eps: those that `DIRECTIONS` says the optimizer uses; it ignores the others. beta1
            is the momentum of sgd and muon.
        clip_norm: the largest global norm of the gradient; None: no clip.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DIRECTIONS:
        raise ValueError(f"optimizer: found {name!r}, expected adamw, muon, lion, adafactor or sgd")
    direction = DIRECTIONS[name]
    values = {"beta1": beta1, "beta2": beta2, "eps": eps}
    rule = optax.chain(
        per_layer(direction.make(**{option: values[option] for option in direction.uses})),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    clip = optax.identity() if clip_norm is None else _clip(clip_norm)
    return optax.with_extra_args_support(optax.chain(clip, rule))


def global_norm(tree: Any) -> Float[Array, ""]:
    """The norm of all leaves as one vector, in float32 (float64 for float64)."""

    def squares(leaf: Array) -> Array:
        return jnp.sum(jnp.square(leaf.astype(working_dtype(leaf.dtype))))

    return jnp.sqrt(sum(map(squares, jax.tree.leaves(tree))))


def _clip(largest: float) -> optax.GradientTransformation:
    """Optax's clip adds up squares in the gradients' dtype, of which bfloat16 loses a percent."""

    def clip(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = global_norm(gradients)

        def shorten(leaf: Array) -> Array:
            shorter = leaf.astype(norm.dtype) / norm * largest
            return jnp.where(norm < largest, leaf, shorter.astype(leaf.dtype))

        return jax.tree.map(shorten, gradients), state

    return optax.GradientTransformation(optax.init_empty_state, clip)
