"""The Llama family in JAX/Flax NNX, proved equal to PyTorch."""

import signal
import sys

# `python -m llama_jax` begins when all this is imported: until then Ctrl-C ends it without a traceback
if (
    sys.argv[:1] == ["-m"]
    and ["-m", "llama_jax"] in [sys.orig_argv[place : place + 2] for place in range(1, 9)]
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from llama_jax.attention.cache import KVCache, init_cache
from llama_jax.config import LlamaConfig
from llama_jax.generation.config import GenerationConfig
from llama_jax.generation.loop import GenerateOutput
from llama_jax.loss import LossOutput, fused_linear_cross_entropy
from llama_jax.models.causal_lm import CausalLMOutput, LlamaForCausalLM
from llama_jax.models.decoder import LlamaModel, ModelOutput
from llama_jax.models.lm_head import (
    LMHead,
    LMHeadConfig,
    LMOutputWithLoss,
    NormalizedLMHead,
    normalize_rows,
)
from llama_jax.models.question_answering import (
    LlamaForQuestionAnswering,
    QuestionAnsweringModelOutput,
)
from llama_jax.models.sequence_classification import (
    LlamaForSequenceClassification,
    SequenceClassifierOutput,
)
from llama_jax.models.token_classification import LlamaForTokenClassification, TokenClassifierOutput
from llama_jax.presets import PRESETS
from llama_jax.quantization.model import Quantization, dequantize, quantize

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
    "LlamaForQuestionAnswering",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaModel",
    "LossOutput",
    "ModelOutput",
    "NormalizedLMHead",
    "Quantization",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
    "dequantize",
    "fused_linear_cross_entropy",
    "init_cache",
    "normalize_rows",
    "quantize",
]
