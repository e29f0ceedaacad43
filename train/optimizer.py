"""Optimizers by name, all of optax, with a decay mask and a clip by global norm."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from jax.tree_util import keystr

Optimizer = Literal["adamw", "muon", "lion", "adafactor", "sgd"]


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
    """Clip by global norm, then the optimizer, decoupled decay on what `decay_mask` names.

    muon (Keller Jordan et al., 2024) updates the matrices of the layers, AdamW everything else, both with
    Nesterov's momentum, which is `beta1`. Its update has the scale 0.2 * sqrt(max(in, out)) of
    arXiv:2502.16982, so that AdamW's learning rates suit it.
    """
    common = {"weight_decay": weight_decay, "mask": decay_mask}
    if name == "adamw":
        rule = optax.adamw(learning_rate, b1=beta1, b2=beta2, eps=eps, **common)
    elif name == "muon":
        # its own decay has no mask for AdamW's share: here decay, sign and rate come after
        direction = optax.contrib.muon(
            -1.0,
            beta=beta1,
            eps=eps,
            adam_b1=beta1,
            adam_b2=beta2,
            muon_weight_dimension_numbers=_layer_matrices,
            consistent_rms=0.2,
        )
        decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
        rule = optax.chain(direction, decay, optax.scale_by_learning_rate(learning_rate))
    elif name == "lion":
        rule = optax.lion(learning_rate, b1=beta1, b2=beta2, **common)
    elif name == "adafactor":
        rule = optax.adafactor(
            learning_rate, weight_decay_rate=weight_decay or None, weight_decay_mask=decay_mask
        )
    elif name == "sgd":
        decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
        rule = optax.chain(decay, optax.sgd(learning_rate, momentum=beta1))
    else:
        raise ValueError(f"optimizer: found {name!r}, expected adamw, muon, lion, adafactor or sgd")
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optax.with_extra_args_support(optax.chain(clip, rule))


def _layer_matrices(params: Any) -> Any:
    """Muon's dimension numbers of the stacked matrices [layers, out, in]; None for AdamW's share."""

    def numbers(path: tuple[Any, ...], leaf: Any) -> Any:
        name = keystr(path, simple=True, separator=".")
        if ".layers." in name and leaf.ndim == 3:
            return optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
        return None

    return jax.tree_util.tree_map_with_path(numbers, params)
