"""Twelve deliberate mistakes, each one that some port of Llama has made.

    with mutate("loss_without_shift"):
        ...

A suite that stays green under one of them proves nothing. Mutations of weights change them as they are
loaded, so that every test that loads weights sees them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.attention import masks
from llama_jax.checkpoints import huggingface
from llama_jax.models import causal_lm, decoder, layers

Buffers = dict[tuple[str, ...], np.ndarray]


class Mutation(NamedTuple):
    """`target.attribute` becomes `replacement(original)`; `begins_at` is the first module to drift.

    `fault` is its name in `faults/catalogue.py`, by which a check of a recording names it.
    """

    target: Any
    attribute: str
    replacement: Callable[[Any], Any]
    begins_at: str
    fault: str


@contextlib.contextmanager
def mutate(name: str) -> Iterator[None]:
    """Break the library in one way. Clears JAX's caches before and after."""
    mutation = MUTATIONS[name]
    wrong = mutation.replacement(getattr(mutation.target, mutation.attribute))
    with mock.patch.object(mutation.target, mutation.attribute, wrong):
        jax.clear_caches()
        try:
            yield
        finally:
            jax.clear_caches()


# Mistakes in the layout of weights, made between reading them and building the model.


def while_loading(change: Callable[[Buffers, Any], None]) -> Callable[[Any], Any]:
    def replacement(merge: Any) -> Any:
        def wrong(abstract: Any, buffers: Buffers) -> Any:
            change(buffers, abstract.config)
            return merge(abstract, buffers)

        return wrong

    return replacement


def _ending(buffers: Buffers, *names: str) -> Iterator[np.ndarray]:
    """The parameters of the modules with these names, to be changed in place."""
    for path, array in buffers.items():
        if path[-2] in names:
            yield array


def no_permutation(buffers: Buffers, config: Any) -> None:
    """The rows of q and k in the order of the original Llama: each pair side by side."""
    for array in _ending(buffers, "q_proj", "k_proj"):
        layer_count, rows = array.shape[:2]
        dim, columns = config.head_size, array.shape[2:]
        halves = array.reshape(layer_count, rows // dim, 2, dim // 2, *columns)
        array[...] = halves.swapaxes(2, 3).reshape(array.shape)


def norms_swapped(buffers: Buffers, config: Any) -> None:
    first, second = _ending(buffers, "input_layernorm", "post_attention_layernorm")
    first[...], second[...] = second.copy(), first.copy()


def o_proj_transposed(buffers: Buffers, config: Any) -> None:
    """[in, out] read as [out, in], which is no error for a square matrix; others are reshaped."""
    for path, array in buffers.items():
        if path[-2:] == ("o_proj", "weight"):
            array[...] = array.swapaxes(1, 2).reshape(array.shape)


# Mistakes in the computation.


def theta_10000(cos_sin: Any) -> Any:
    def wrong(positions: Any, rope: Any, *args: Any) -> Any:
        return cos_sin(positions, dict(rope) | {"rope_theta": 10000.0}, *args)

    return wrong


def scaling_dropped(cos_sin: Any) -> Any:
    def wrong(positions: Any, rope: Any, *args: Any) -> Any:
        plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        return cos_sin(positions, plain, *args)

    return wrong


def position_off_by_one(cos_sin: Any) -> Any:
    """Every token but the first is one position too far. (If the first were too, nothing would change:
    attention only depends on differences of positions.)"""

    def wrong(positions: Any, *args: Any) -> Any:
        return cos_sin(positions + (positions > 0).astype(positions.dtype), *args)

    return wrong


def eps_1e_6(rms_norm: Any) -> Any:
    return lambda x, weight, eps: rms_norm(x, weight, 1e-6)


def tiled_kv_heads(attention: Any) -> Any:
    """Query head h reads kv head h % K, not h // (N / K): `tile` in place of `repeat`."""

    def wrong(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        heads, kv_heads = query.shape[2], key.shape[2]
        order = np.arange(heads).reshape(heads // kv_heads, kv_heads).T.reshape(-1)
        out, weights = attention(query[:, :, order], key, value, mask, **options)
        back = np.argsort(order)
        return out[:, :, back], None if weights is None else weights[:, back]

    return wrong


def mask_off_by_one(mask: Any) -> Any:
    """Every query sees one key of the future."""
    return lambda query_slots, *args: mask(query_slots + 1, *args)


def bfloat16_cast(attention: Any) -> Any:
    def wrong(*args: Any, **options: Any) -> Any:
        out, weights = attention(*args, **options)
        return out.astype(jnp.bfloat16).astype(out.dtype), weights

    return wrong


def no_shift(shift: Any) -> Any:
    return lambda labels: labels


def mean_over_all(loss: Any) -> Any:
    def wrong(hidden: Any, head: Any, labels: Any, num_items: Any, *rest: Any) -> Any:
        return loss(hidden, head, labels, labels.size if num_items is None else num_items, *rest)

    return wrong


MUTATIONS: dict[str, Mutation] = {
    "no_qk_permutation": Mutation(
        huggingface,
        "_merge",
        while_loading(no_permutation),
        "layers.0.self_attn.q_proj",
        "no_qk_permutation",
    ),
    "rope_theta_10000": Mutation(decoder, "rope_cos_sin", theta_10000, "rotary.cos", "rope_theta"),
    "rope_scaling_dropped": Mutation(
        decoder, "rope_cos_sin", scaling_dropped, "rotary.cos", "rope_scaling_dropped"
    ),
    "norms_swapped": Mutation(
        huggingface,
        "_merge",
        while_loading(norms_swapped),
        "layers.0.input_layernorm",
        "norms_swapped",
    ),
    "eps_1e-6": Mutation(layers, "rms_norm", eps_1e_6, "layers.0.input_layernorm", "norm_eps"),
    "o_proj_transposed": Mutation(
        huggingface,
        "_merge",
        while_loading(o_proj_transposed),
        "layers.0.self_attn.o_proj",
        "transposed",
    ),
    "kv_heads_tiled": Mutation(
        layers, "attention", tiled_kv_heads, "layers.0.self_attn.attention", "kv_heads_tiled"
    ),
    "position_off_by_one": Mutation(
        decoder, "rope_cos_sin", position_off_by_one, "rotary.cos", "position_off_by_one"
    ),
    "mask_off_by_one": Mutation(
        masks, "attention_mask", mask_off_by_one, "mask", "mask_off_by_one"
    ),
    "loss_without_shift": Mutation(
        causal_lm, "shift_labels", no_shift, "loss", "loss_without_shift"
    ),
    "mean_over_all_tokens": Mutation(
        causal_lm, "causal_lm_loss", mean_over_all, "loss", "mean_over_all_tokens"
    ),
    "bfloat16_cast": Mutation(
        layers, "attention", bfloat16_cast, "layers.0.self_attn.attention", "softmax_bfloat16"
    ),
}
