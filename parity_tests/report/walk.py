"""Module by module: which is the first of ours to depart from the oracle?

The oracle runs forward and every intermediate is kept. Each of our modules is then given the
oracle's input of that module, so that an error shows where it is made and nowhere behind it. The
names are those of Hugging Face's modules, in forward order, with a few for what is no module there:
`mask`, `rotary`, `rotate`, `attention`, `loss`.
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
from parity_tests.harness.programs import FAST_COMPILE, our_inputs, our_model
from parity_tests.reference import oracle
from parity_tests.reference.errors import relative_error
from parity_tests.report.programs import jax_layers, oracle_layers
from parity_tests.report.programs.program import LAYER_STEPS

Steps = dict[str, Any]


def oracle_steps(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> Steps:
    """Every intermediate of the oracle in float64, in forward order."""
    weights = {name: w.double() for name, w in weights.items()}
    given = torch_inputs(inputs)
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[given["input_ids"]] if "input_ids" in given else given["inputs_embeds"].double()
    batch, length, _ = x.shape
    positions = given.get("position_ids", torch.arange(length).expand(batch, -1))
    visible = oracle.visibility(
        batch, length, given.get("attention_mask"), given.get("segment_ids")
    )
    cos, sin = oracle.cos_sin(config, positions)
    steps: Steps = {"embed_tokens": x, "mask": visible, "rotary.cos": cos, "rotary.sin": sin}

    for layer in range(config["num_hidden_layers"]):
        name = f"layers.{layer}"
        prefix = f"model.{name}."
        of_layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        made = oracle_layers.layer_steps(config, of_layer, x, cos, sin, visible)
        steps[f"{name}.input"], steps[f"{name}.middle"] = x, x + made["self_attn.o_proj"]
        steps |= {_named(name, step): value for step, value in made.items()}
        x = made[""]
    x = steps["norm"] = oracle.rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    logits = steps["lm_head"] = x @ weights.get("lm_head.weight", embedding).T
    if "labels" in given:
        steps["loss"] = oracle.causal_lm_loss(
            logits, given["labels"], given.get("num_items_in_batch")
        )
    return steps


def our_steps(ours: LlamaForCausalLM, inputs: Mapping[str, Any], steps: Steps) -> Steps:
    """The same intermediates from our modules, each run on the oracle's input of it."""
    config, decoder = ours.config, ours.model
    given, ints = our_inputs(inputs, ours.dtype)
    want = {name: jnp.asarray(value.numpy()) for name, value in steps.items()}
    batch, length, _ = want["embed_tokens"].shape
    half = config.head_size // 2
    got: Steps = {}
    got["embed_tokens"] = (
        decoder.embed_tokens(given["input_ids"]) if "input_ids" in given else given["inputs_embeds"]
    )
    slots, token = jnp.arange(length), given.get("attention_mask")
    token, segments = None if token is None else token.astype(bool), given.get("segment_ids")
    mask = masks.AttentionMask(None, None, token, segments, segments)
    got["mask"] = jnp.broadcast_to(masks.dense_mask(mask, length, length), want["mask"].shape)
    got["rotary.cos"], got["rotary.sin"] = (
        jnp.concatenate([part, part], axis=-1)
        for part in model.rope_cos_sin(
            given.get("position_ids", jnp.broadcast_to(slots, (batch, length))),
            config.rope,
            config.head_size,
            config.max_position_embeddings,
            ours.dtype,
        )
    )
    cos, sin = want["rotary.cos"][..., :half], want["rotary.sin"][..., :half]
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        block = jax.tree.map(lambda stacked, layer=layer: stacked[layer], decoder.layers)
        taken = {step: want[_named(name, step)] for step in (*LAYER_STEPS, "middle")}
        made = jax_layers.layer_steps(block, want[f"{name}.input"], cos, sin, mask, taken)
        got |= {_named(name, step): made[step] for step in LAYER_STEPS}
    got["norm"] = decoder.norm(want[name])
    head = decoder.embed_tokens if config.tie_word_embeddings else ours.lm_head
    got["lm_head"] = layers.linear(want["norm"], head.weight[...], None)
    if "labels" in given:
        labels = causal_lm.shift_labels(given["labels"])
        items = ints.get("num_items_in_batch")
        got["loss"] = causal_lm.causal_lm_loss(want["norm"], head.weight[...], labels, items)
    return got


def _named(layer: str, step: str) -> str:
    """The layer's own output has no name of a step."""
    return f"{layer}.{step}" if step else layer


def drifts(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> dict[str, float]:
    """Relative error of each of our modules in float64, in forward order."""
    steps = oracle_steps(config, weights, inputs)
    with jax.enable_x64(True):
        ours = our_model(config, weights, jnp.float64)
        run = jax.jit(lambda ours: our_steps(ours, inputs, steps), compiler_options=FAST_COMPILE)
        got = run(ours)
        # jit sorts dictionaries by name; the oracle's order is the forward one.
        return {name: relative_error(got[name], steps[name]) for name in steps if name in got}


def first_drift(errors: Mapping[str, float], bar: float) -> str | None:
    """The name of the first module above the bar; NaN is above every bar."""
    return next((name for name, error in errors.items() if not error <= bar), None)
