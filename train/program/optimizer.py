"""Optimizers by name: an update direction, decoupled weight decay, and clipping by global norm."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array, Float

from llama_jax.numerics.matmul import working_dtype
from train.options import Optimizer, StateDtype
from train.program.muon import scale_by_muon
from train.program.mup import scale_updates
from train.program.optimizer_state import kept_in
from train.program.per_layer import is_stacked, per_layer


class Direction(NamedTuple):
    """What distinguishes an optimizer.

    uses: which of `beta1`, `beta2` and `eps` it has.
    make: builds, from these, the transformation of gradients to what the learning rate multiplies. It
        includes neither learning rate nor weight decay, and sees the parameters of each layer separately.
    """

    uses: tuple[str, ...]
    make: Callable[..., optax.GradientTransformation]


def _adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(beta1, beta2, eps)


def _muon(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Muon for the matrices in the layers and Adam for everything else, as its authors recommend."""

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        return "muon" if is_stacked(path) and leaf.ndim == 2 else "adam"

    return optax.partition(
        {"muon": scale_by_muon(beta1, eps), "adam": _adam(beta1, beta2, eps)},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def _adafactor() -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235, algorithm 4) as in T5 and optax: no momentum, and its own eps.

    beta2 is 1 - step^-0.8. The root mean square of the update is clipped to 1 and multiplied by that of the
    parameter, or by 0.001 if that is larger.
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
    """True for weight matrices, including embedding and head; False for norms and biases."""

    return jax.tree_util.tree_map_with_path(
        lambda path, _: decays(keystr(path, simple=True, separator=".")), params
    )


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter of a name, ours or Hugging Face's.

    >>> decays("model.layers.0.mlp.up_proj.weight"), decays("model.norm.weight")
    (True, False)
    """
    return not name.endswith("bias") and "norm" not in name


def make_optimizer(
    name: Optimizer,
    learning_rate: float | Callable[..., Any],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
    state_dtype: StateDtype | None = None,
    scales: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then p -= learning_rate * (direction + weight_decay * p).

    Weight decay is decoupled (arXiv:1711.05101) and applies where `decay_mask` is True. Stacked layers are
    updated as if each were a separate parameter; clipping is over the complete tree.

    Args:
        beta1, beta2, eps: only those used by the optimizer, see `DIRECTIONS`, matter. beta1 is the
            momentum of sgd and muon.
        clip_norm: the largest global norm of the gradient; None: no clipping.
        state_dtype: of what is kept of each parameter, see `kept_in`; None: the parameters' dtype.
        scales: factors on the directions of the parameters of these names, see `train.program.mup`; not on
            their weight decay, which takes the same share of every matrix in a step.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DIRECTIONS:
        raise ValueError(f"optimizer: found {name!r}, expected adamw, muon, lion, adafactor or sgd")
    direction = DIRECTIONS[name]
    values = {"beta1": beta1, "beta2": beta2, "eps": eps}
    update = per_layer(direction.make(**{option: values[option] for option in direction.uses}))
    if state_dtype is not None:
        update = kept_in(jnp.dtype(state_dtype), update)
    rule = optax.chain(
        update,
        *([scale_updates(scales)] if scales else []),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    clip = optax.identity() if clip_norm is None else _clip(clip_norm)
    return optax.with_extra_args_support(optax.chain(clip, rule))


def global_norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm of all leaves together, in float32 (float64 for float64)."""

    def squares(leaf: Array) -> Array:
        return jnp.sum(jnp.square(leaf.astype(working_dtype(leaf.dtype))))

    return jnp.sqrt(sum(map(squares, jax.tree.leaves(tree))))


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Like optax.clip_by_global_norm, which sums in the gradients' dtype and is off by 1% in bfloat16."""

    def clip(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = global_norm(gradients)

        def scale(leaf: Array) -> Array:
            scaled = leaf.astype(norm.dtype) / norm * max_norm
            return jnp.where(norm < max_norm, leaf, scaled.astype(leaf.dtype))

        return jax.tree.map(scale, gradients), state

    return optax.GradientTransformation(optax.init_empty_state, clip)
