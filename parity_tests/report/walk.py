"""Compare module by module in float64: which of ours is the first to depart from the oracle?

The oracle runs forward and every intermediate is kept. Each of our modules is then run on the oracle's
input of it, so that an error shows in the module that makes it and in none after it. The names are those of
Hugging Face's modules, in forward order, with a few for what is no module there: `mask`, `rotary`,
`rotate`, `attention`, `loss`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from llama_jax import LlamaForCausalLM
from llama_jax.attention import masks
from llama_jax.models import causal_lm, layers
from llama_jax.models import decoder as model
from parity_tests.harness.cases import torch_inputs
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.harness.programs import our_inputs, our_model
from parity_tests.reference import oracle
from parity_tests.reference.errors import relative_error
from parity_tests.report.programs import jax_steps, oracle_layers
from parity_tests.report.programs.steps import AFTER_ATTENTION, LAYER_STEPS, OUTPUT

Steps = dict[str, Any]


def oracle_steps(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> Steps:
    """Every intermediate of the oracle in float64, in forward order."""
    weights = {name: weight.double() for name, weight in weights.items()}
    tensors = torch_inputs(inputs)
    embedding = weights["model.embed_tokens.weight"]
    ids = tensors.get("input_ids")
    x = tensors["inputs_embeds"].double() if ids is None else embedding[ids]
    batch, length, _ = x.shape
    positions = tensors.get("position_ids", torch.arange(length).expand(batch, -1))
    visible = oracle.visibility(
        batch, length, tensors.get("attention_mask"), tensors.get("segment_ids")
    )
    cos, sin = oracle.cos_sin(config, positions)
    steps: Steps = {"embed_tokens": x, "mask": visible, "rotary.cos": cos, "rotary.sin": sin}

    for layer in range(config["num_hidden_layers"]):
        name = f"layers.{layer}"
        prefix = f"model.{name}."
        of_layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        layer_steps = oracle_layers.layer_steps(config, of_layer, x, cos, sin, visible)
        steps[f"{name}.input"] = x
        steps[f"{name}.{AFTER_ATTENTION}"] = x + layer_steps["self_attn.o_proj"]
        steps |= {_full_name(name, step): value for step, value in layer_steps.items()}
        x = layer_steps[OUTPUT]
    x = steps["norm"] = oracle.rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    logits = steps["lm_head"] = x @ weights.get("lm_head.weight", embedding).T
    if "labels" in tensors:
        steps["loss"] = oracle.causal_lm_loss(
            logits, tensors["labels"], tensors.get("num_items_in_batch")
        )
    return steps


def our_steps(ours: LlamaForCausalLM, inputs: Mapping[str, Any], oracles: Steps) -> Steps:
    """The same intermediates from our modules, each run on the oracle's input of it."""
    config, decoder = ours.config, ours.model
    arrays, ints = our_inputs(inputs, ours.dtype)
    exact = {name: jnp.asarray(value.numpy()) for name, value in oracles.items()}
    batch, length, _ = exact["embed_tokens"].shape
    half = config.head_size // 2
    steps: Steps = {}
    if "input_ids" in arrays:
        steps["embed_tokens"] = decoder.embed_tokens(arrays["input_ids"])
    else:
        steps["embed_tokens"] = arrays["inputs_embeds"]
    is_token, segments = arrays.get("attention_mask"), arrays.get("segment_ids")
    is_token = None if is_token is None else is_token.astype(bool)
    mask = masks.AttentionMask(None, None, is_token, segments, segments)
    dense = masks.dense_mask(mask, length, length)
    steps["mask"] = jnp.broadcast_to(dense, exact["mask"].shape)
    steps["rotary.cos"], steps["rotary.sin"] = (
        jnp.concatenate([part, part], axis=-1)
        for part in model.rope_cos_sin(
            arrays.get("position_ids", jnp.broadcast_to(jnp.arange(length), (batch, length))),
            config.rope,
            config.head_size,
            config.max_position_embeddings,
            ours.dtype,
        )
    )
    cos, sin = exact["rotary.cos"][..., :half], exact["rotary.sin"][..., :half]
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        block = jax.tree.map(lambda stacked, layer=layer: stacked[layer], decoder.layers)
        layer_inputs = {
            step: exact[_full_name(name, step)] for step in (*LAYER_STEPS, AFTER_ATTENTION)
        }
        x = exact[f"{name}.input"]

        def read(step: str, _: Any, of_layer: Steps = layer_inputs) -> Any:
            return of_layer[step]

        layer_steps = jax_steps.layer_steps(block, x, cos, sin, mask, read)
        layer_steps[OUTPUT] = jax_steps.call_layer(block, x, cos, sin, mask)
        steps |= {_full_name(name, step): layer_steps[step] for step in LAYER_STEPS}
    steps["norm"] = decoder.norm(exact[f"layers.{config.num_hidden_layers - 1}"])
    head = decoder.embed_tokens if config.tie_word_embeddings else ours.lm_head
    steps["lm_head"] = layers.linear(exact["norm"], head.weight[...], None)
    if "labels" in arrays:
        labels = causal_lm.shift_labels(arrays["labels"])
        items = ints.get("num_items_in_batch")
        steps["loss"] = causal_lm.causal_lm_loss(exact["norm"], head.weight[...], labels, items)
    return steps


def _full_name(layer: str, step: str) -> str:
    return layer if step == OUTPUT else f"{layer}.{step}"


def drifts(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> dict[str, float]:
    """Relative error of each of our modules in float64, in forward order."""
    exact = oracle_steps(config, weights, inputs)
    with jax.enable_x64(True):
        ours = our_model(config, weights, jnp.float64)
        run = jax.jit(lambda ours: our_steps(ours, inputs, exact), compiler_options=FAST_COMPILE)
        steps = run(ours)
        # jit sorts dictionaries by name; the oracle's order is the forward one.
        return {name: relative_error(steps[name], exact[name]) for name in exact if name in steps}


def first_drift(errors: Mapping[str, float], bar: float) -> str | None:
    """The name of the first module above the bar; NaN is above every bar."""
    return next((name for name, error in errors.items() if not error <= bar), None)
