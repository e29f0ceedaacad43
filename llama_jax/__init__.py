"""The Llama family in JAX/Flax NNX, proved equal to PyTorch."""

from llama_jax.cache import KVCache, init_cache
from llama_jax.config import LlamaConfig
from llama_jax.generation import GenerateOutput
from llama_jax.generation_config import GenerationConfig
from llama_jax.lm_head import (
    LMHead,
    LMHeadConfig,
    LMOutputWithLoss,
    NormalizedLMHead,
    normalize_rows,
)
from llama_jax.loss import LossOutput, fused_linear_cross_entropy
from llama_jax.model import LlamaModel, ModelOutput
from llama_jax.presets import PRESETS
from llama_jax.tasks import CausalLMOutput, LlamaForCausalLM

__all__ = [
    "PRESETS",
    "CausalLMOutput",
    "GenerateOutput",
    "GenerationConfig",
    "KVCache",
    "LMHead",
    "LMHeadConfig",
    "LMOutputWithLoss",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LlamaModel",
    "LossOutput",
    "ModelOutput",
    "NormalizedLMHead",
    "fused_linear_cross_entropy",
    "init_cache",
    "normalize_rows",
]
