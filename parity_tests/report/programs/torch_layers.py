"""Hugging Face's own modules, a layer at a time: `LlamaDecoderLayer` and what stands around it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig as HFConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama import modeling_llama as hf

from llama_jax.formatting import first_line
from parity_tests.report.programs.checkpoint import EMBEDDING, NORM, Checkpoint, read, read_layer
from parity_tests.report.programs.oracle_layers import gradients
from parity_tests.report.programs.program import LAYER_STEPS, Program, Steps, as_torch, torch_dtype

_POSITIONS = 256  # whose logits are in memory at once


def program(checkpoint: Checkpoint, dtype: Any, length: int) -> Program:
    """transformers' Llama with `sdpa` attention, weights and computation in `dtype`.

    Raises:
        ValueError: transformers refuses the directory's config.
    """
    config = _config(checkpoint)
    dim = checkpoint.config.head_size
    positions = torch.arange(length)[None]
    rotary = hf.LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch_dtype(dtype)), positions)

    def filled(module: nn.Module, **tensors: np.ndarray) -> nn.Module:
        weights = {name: as_torch(tensor) for name, tensor in tensors.items()}
        module.load_state_dict(weights, strict=True, assign=True)
        return module.eval()

    def weight(name: str) -> np.ndarray:
        return read(checkpoint, name, dtype)

    def embedding() -> nn.Module:
        vocab, size, pad = config.vocab_size, config.hidden_size, config.pad_token_id
        with torch.device("meta"):
            module = nn.Embedding(vocab, size, pad)
        return filled(module, weight=weight(EMBEDDING))

    def decoder_layer(index: int) -> nn.Module:
        with torch.device("meta"):
            module = hf.LlamaDecoderLayer(config, 0)
        return filled(module, **read_layer(checkpoint, index, dtype))

    def final_norm() -> nn.Module:
        with torch.device("meta"):
            module = hf.LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        return filled(module, weight=weight(NORM))

    def lm_head() -> nn.Module:
        with torch.device("meta"):
            module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        return filled(module, weight=weight(checkpoint.head))

    def run(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, position_embeddings=rotary, position_ids=positions)

    def ends() -> Steps:
        cos, sin = rotary
        mask = hf.create_causal_mask(
            config=_config(checkpoint, "eager"),
            inputs_embeds=torch.zeros(1, length, config.hidden_size),
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        return {"mask": mask[0, 0] == 0, "rotary.cos": cos[0], "rotary.sin": sin[0]}

    @torch.no_grad()
    def embed(ids: np.ndarray) -> Tensor:
        return embedding()(torch.from_numpy(ids))

    @torch.no_grad()
    def layer(index: int, x: Tensor) -> tuple[Steps, Tensor]:
        module, steps = decoder_layer(index), {}
        for name, part in module.named_modules():
            if name in LAYER_STEPS:
                part.register_forward_hook(lambda _, __, out, name=name: steps.update({name: out}))
        for name, part in (
            ("self_attn.attention", "self_attn.o_proj"),
            ("mlp.act", "mlp.down_proj"),
        ):
            module.get_submodule(part).register_forward_pre_hook(
                lambda _, given, name=name: steps.update({name: given[0]})
            )
        out = run(module, x)
        q, k = (steps[f"self_attn.{p}_proj"].view(1, length, -1, dim).transpose(1, 2) for p in "qk")
        q, k = hf.apply_rotary_pos_emb(q, k, *rotary)
        rotated = {"self_attn.rotate.q": q.transpose(1, 2), "self_attn.rotate.k": k.transpose(1, 2)}
        steps = steps | rotated | {"": out}
        return {name: steps[name] for name in LAYER_STEPS}, out

    @torch.no_grad()
    def norm(x: Tensor) -> Tensor:
        return final_norm()(x)

    def head() -> Callable[[Tensor, int, int], Tensor]:
        module = lm_head()
        return torch.no_grad()(lambda hidden, first, last: module(hidden[0, first:last]))

    @torch.no_grad()
    def loss(hidden: Tensor, ids: np.ndarray) -> float:
        # as transformers sums it over micro-batches: the logits of all positions at once are too large
        labels, module = torch.from_numpy(ids)[0, 1:], lm_head()
        return sum(
            float(
                ForCausalLMLoss(
                    module(rows),
                    None,
                    config.vocab_size,
                    num_items_in_batch=len(labels),
                    shift_labels=targets,
                )
            )
            for rows, targets in zip(
                hidden[0, :-1].split(_POSITIONS), labels.split(_POSITIONS), strict=True
            )
        )

    def head_vjp(x: Tensor, ids: np.ndarray) -> tuple[Tensor, Steps]:
        x, norm, head = x.detach().requires_grad_(), final_norm(), lm_head()
        value = ForCausalLMLoss(head(norm(x)), torch.from_numpy(ids), config.vocab_size)
        parameters = {NORM: norm.weight, checkpoint.head: head.weight}
        return gradients(value, x, parameters, None)

    def layer_vjp(index: int, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Steps]:
        x, module = x.detach().requires_grad_(), decoder_layer(index)
        return gradients(run(module, x), x, dict(module.named_parameters()), cotangent)

    def embed_vjp(ids: np.ndarray, cotangent: Tensor, head: Tensor | None) -> Tensor:
        module = embedding()
        (gradient,) = torch.autograd.grad(module(torch.from_numpy(ids)), module.weight, cotangent)
        return gradient if head is None else gradient + head

    return Program(
        "PyTorch",
        ends,
        embed,
        layer,
        norm,
        head,
        loss,
        head_vjp,
        layer_vjp,
        embed_vjp,
        lambda x: x,
        lambda x: x,
    )


def _config(checkpoint: Checkpoint, attention: str = "sdpa") -> HFConfig:
    try:
        config = HFConfig.from_pretrained(checkpoint.directory)
        config._attn_implementation = attention
        with torch.device("meta"):
            hf.LlamaDecoderLayer(config, 0)
        hf.LlamaRotaryEmbedding(config)
    except Exception as error:  # whatever its checks and theirs raise
        raise ValueError(
            f"{checkpoint.directory}: transformers cannot load it: {first_line(error)}"
        ) from None
    return config
