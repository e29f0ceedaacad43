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

from llama_jax import LlamaForCausalLM, causal_lm, layers, masks, model
from parity_tests import oracle
from parity_tests.cases import torch_inputs
from parity_tests.measure import relative_error
from parity_tests.programs import FAST_COMPILE, our_inputs, our_model

Steps = dict[str, Any]


def oracle_steps(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> Steps:
    """Every intermediate of the oracle in float64, in forward order."""
    weights = {name: w.double() for name, w in weights.items()}
    given, eps, dim = torch_inputs(inputs), config["rms_norm_eps"], oracle.head_dim(config)
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[given["input_ids"]] if "input_ids" in given else given["inputs_embeds"].double()
    batch, length, _ = x.shape
    positions = given.get("position_ids", torch.arange(length).expand(batch, -1))
    visible = oracle.visibility(
        batch, length, given.get("attention_mask"), given.get("segment_ids")
    )
    cos, sin = oracle.cos_sin(config, positions)
    steps: Steps = {"embed_tokens": x, "mask": visible, "rotary.cos": cos, "rotary.sin": sin}

    def linear(name: str, x: Tensor, slices: int = 1) -> Tensor:
        steps[name] = oracle.linear(weights, f"model.{name}", x, slices)
        return steps[name]

    def norm(name: str, x: Tensor) -> Tensor:
        steps[name] = oracle.rms_norm(x, weights[f"model.{name}.weight"], eps)
        return steps[name]

    def heads(x: Tensor) -> Tensor:
        return x.view(batch, length, -1, dim).transpose(1, 2)

    slices = config.get("pretraining_tp") or 1
    for layer in range(config["num_hidden_layers"]):
        name = f"layers.{layer}"
        steps[f"{name}.input"] = x
        normed = norm(f"{name}.input_layernorm", x)
        q, k, v = (heads(linear(f"{name}.self_attn.{p}_proj", normed)) for p in "qkv")
        q = steps[f"{name}.self_attn.rotate.q"] = oracle.rotate(q, cos, sin)
        k = steps[f"{name}.self_attn.rotate.k"] = oracle.rotate(k, cos, sin)
        mixed, _ = oracle.attention(q, k, v, visible)
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
        steps[f"{name}.self_attn.attention"] = mixed
        x = x + linear(f"{name}.self_attn.o_proj", mixed, slices)
        steps[f"{name}.middle"] = x
        normed = norm(f"{name}.post_attention_layernorm", x)
        gate = linear(f"{name}.mlp.gate_proj", normed)
        up = linear(f"{name}.mlp.up_proj", normed)
        hidden = steps[f"{name}.mlp.act"] = oracle.ACTIVATIONS[config["hidden_act"]](gate) * up
        x = x + linear(f"{name}.mlp.down_proj", hidden, slices)
        steps[name] = x
    x = norm("norm", x)
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
    split, half = (batch, length, -1, config.head_size), config.head_size // 2
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
        attn, mlp = block.self_attn, block.mlp
        normed = want[f"{name}.input_layernorm"]
        got[f"{name}.input_layernorm"] = block.input_layernorm(want[f"{name}.input"])
        for p in "qkv":
            got[f"{name}.self_attn.{p}_proj"] = getattr(attn, f"{p}_proj")(normed)
        for p in "qk":
            projected = want[f"{name}.self_attn.{p}_proj"].reshape(split)
            turned = layers.rotate(projected, cos, sin)
            got[f"{name}.self_attn.rotate.{p}"] = turned.swapaxes(1, 2)
        q, k = (want[f"{name}.self_attn.rotate.{p}"].swapaxes(1, 2) for p in "qk")
        v = want[f"{name}.self_attn.v_proj"].reshape(split)
        mixed, _ = layers.attention(q, k, v, mask)
        got[f"{name}.self_attn.attention"] = mixed.reshape(batch, length, -1)
        got[f"{name}.self_attn.o_proj"] = attn.o_proj(want[f"{name}.self_attn.attention"])
        normed = want[f"{name}.post_attention_layernorm"]
        got[f"{name}.post_attention_layernorm"] = block.post_attention_layernorm(
            want[f"{name}.middle"]
        )
        got[f"{name}.mlp.gate_proj"] = mlp.gate_proj(normed)
        got[f"{name}.mlp.up_proj"] = mlp.up_proj(normed)
        act = layers.ACTIVATIONS[mlp.hidden_act]
        got[f"{name}.mlp.act"] = act(want[f"{name}.mlp.gate_proj"]) * want[f"{name}.mlp.up_proj"]
        got[f"{name}.mlp.down_proj"] = mlp.down_proj(want[f"{name}.mlp.act"])
        got[name], *_ = block(
            want[f"{name}.input"], cos, sin, mask, None, jnp.int32(0), jnp.int32(0), None
        )
    got["norm"] = decoder.norm(want[name])
    head = decoder.embed_tokens if config.tie_word_embeddings else ours.lm_head
    got["lm_head"] = layers.linear(want["norm"], head.weight[...], None)
    if "labels" in given:
        labels = causal_lm.shift_labels(given["labels"])
        items = ints.get("num_items_in_batch")
        got["loss"] = causal_lm.causal_lm_loss(want["norm"], head.weight[...], labels, items)
    return got


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
