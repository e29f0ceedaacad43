"""Hugging Face's program: `LlamaDecoderLayer` and the modules around it."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM as HFLlama
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama import modeling_llama as hf

from llama_jax.formatting import first_line
from parity_tests.report.programs.checkpoint import EMBEDDING, NORM, Checkpoint, read, read_layer
from parity_tests.report.programs.program import Gradients, Steps
from parity_tests.report.programs.steps import LAYER_STEPS, OUTPUT
from parity_tests.report.programs.tensors import as_torch, gradients, torch_dtype

_LOSS_BLOCK = 256  # positions whose logits are in memory at once
# steps that are no module's output, but the input of one
_INPUT_OF = {"self_attn.o_proj": "self_attn.attention", "mlp.down_proj": "mlp.act"}


class TorchProgram:
    """transformers' Llama with `sdpa` attention, weights and computation in `dtype`.

    Raises:
        ValueError: transformers refuses the directory's config.
    """

    name = "PyTorch"

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.config = _hf_config(checkpoint, "sdpa")

    def mask_and_rotary(self, length: int) -> Steps:
        cos, sin = self._rotary(length)
        mask = hf.create_causal_mask(
            config=_hf_config(self.checkpoint, "eager"),
            inputs_embeds=torch.zeros(1, length, self.config.hidden_size),
            attention_mask=None,
            past_key_values=None,
            position_ids=torch.arange(length)[None],
        )
        return {"mask": mask[0, 0] == 0, "rotary.cos": cos[0], "rotary.sin": sin[0]}

    @torch.no_grad()
    def embed(self, ids: np.ndarray) -> Tensor:
        return self._embedding()(torch.from_numpy(ids))

    @torch.no_grad()
    def layer(self, index: int, hidden: Tensor) -> Steps:
        module, steps = self._layer(index), {}
        for name, part in module.named_modules():
            if name in LAYER_STEPS:
                part.register_forward_hook(lambda _, __, out, name=name: steps.update({name: out}))
            if name in _INPUT_OF:
                part.register_forward_pre_hook(
                    lambda _, inputs, step=_INPUT_OF[name]: steps.update({step: inputs[0]})
                )
        output = self._run(module, hidden)
        heads = (1, hidden.shape[1], -1, self.checkpoint.config.head_size)
        q, k = (steps[f"self_attn.{p}_proj"].view(heads).transpose(1, 2) for p in "qk")
        q, k = hf.apply_rotary_pos_emb(q, k, *self._rotary(hidden.shape[1]))
        steps |= {
            "self_attn.rotate.q": q.transpose(1, 2),
            "self_attn.rotate.k": k.transpose(1, 2),
            OUTPUT: output,
        }
        return {name: steps[name] for name in LAYER_STEPS}

    @torch.no_grad()
    def norm(self, hidden: Tensor) -> Tensor:
        return self._norm()(hidden)

    def logits(self, hidden: Tensor, block: int) -> Iterator[Tensor]:
        head = self._head()
        for rows in hidden[0].split(block):
            with torch.no_grad():
                logits = head(rows)
            yield logits

    def loss(self, hidden: Tensor, ids: np.ndarray) -> float:
        # as transformers sums it over micro-batches: the logits of all positions at once are too large
        labels = torch.from_numpy(ids)[0, 1:]
        blocks = self.logits(hidden[:, :-1], _LOSS_BLOCK)
        return sum(
            float(
                ForCausalLMLoss(
                    logits,
                    None,
                    self.config.vocab_size,
                    num_items_in_batch=len(labels),
                    shift_labels=targets,
                )
            )
            for logits, targets in zip(blocks, labels.split(_LOSS_BLOCK), strict=True)
        )

    def head_vjp(self, hidden: Tensor, ids: np.ndarray) -> tuple[Tensor, Gradients]:
        hidden, norm, head = hidden.detach().requires_grad_(), self._norm(), self._head()
        labels = torch.from_numpy(ids)
        loss = ForCausalLMLoss(head(norm(hidden)), labels, self.config.vocab_size)
        weights = {
            NORM: norm.get_parameter("weight"),
            self.checkpoint.head: head.get_parameter("weight"),
        }
        return gradients(loss, hidden, weights)

    def layer_vjp(self, index: int, hidden: Tensor, cotangent: Tensor) -> tuple[Tensor, Gradients]:
        hidden, module = hidden.detach().requires_grad_(), self._layer(index)
        output = self._run(module, hidden)
        return gradients(output, hidden, dict(module.named_parameters()), cotangent)

    def embed_vjp(self, ids: np.ndarray, cotangent: Tensor) -> Tensor:
        module = self._embedding()
        weight, rows = module.get_parameter("weight"), module(torch.from_numpy(ids))
        (gradient,) = torch.autograd.grad(rows, weight, cotangent)
        return gradient

    def generate(self, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
        dtype, ids = torch_dtype(self.dtype), torch.from_numpy(prompt)
        model = HFLlama.from_pretrained(self.checkpoint.directory, dtype=dtype).eval()
        with torch.no_grad():
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
            ).numpy()

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, D]."""
        like, positions = torch.zeros(1, dtype=torch_dtype(self.dtype)), torch.arange(length)[None]
        return hf.LlamaRotaryEmbedding(self.config)(like, positions)

    def _run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        return layer(
            hidden,
            position_embeddings=self._rotary(length),
            position_ids=torch.arange(length)[None],
        )

    def _embedding(self) -> nn.Module:
        config = self.config
        return _with_weights(
            lambda: nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id),
            {"weight": self._read(EMBEDDING)},
        )

    def _layer(self, index: int) -> nn.Module:
        tensors = read_layer(self.checkpoint, index, self.dtype)
        return _with_weights(lambda: hf.LlamaDecoderLayer(self.config, 0), tensors)

    def _norm(self) -> nn.Module:
        size, eps = self.config.hidden_size, self.config.rms_norm_eps
        return _with_weights(lambda: hf.LlamaRMSNorm(size, eps), {"weight": self._read(NORM)})

    def _head(self) -> nn.Module:
        size, vocab = self.config.hidden_size, self.config.vocab_size
        weight = self._read(self.checkpoint.head)
        return _with_weights(lambda: nn.Linear(size, vocab, bias=False), {"weight": weight})

    def _read(self, name: str) -> np.ndarray:
        return read(self.checkpoint, name, self.dtype)


def _with_weights(make: Callable[[], nn.Module], tensors: Mapping[str, np.ndarray]) -> nn.Module:
    """The module with these weights, for evaluation; made on `meta`, so that it initializes nothing."""
    with torch.device("meta"):
        module = make()
    weights = {name: as_torch(tensor) for name, tensor in tensors.items()}
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval()


def _hf_config(checkpoint: Checkpoint, attention: str) -> HFConfig:
    try:
        config = HFConfig.from_pretrained(checkpoint.directory)
        config._attn_implementation = attention
        with torch.device("meta"):
            hf.LlamaDecoderLayer(config, 0)
        hf.LlamaRotaryEmbedding(config)
    except Exception as error:  # its checks raise errors of many types
        raise ValueError(
            f"{checkpoint.directory}: transformers cannot load it: {first_line(error)}"
        ) from None
    return config
