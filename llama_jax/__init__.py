"""The Llama family in JAX/Flax NNX, tested for numerical parity with PyTorch.

The names below, and the submodules, are imported when they are first used (PEP 562): the command lines
answer `--help` without importing JAX.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.attention.cache import KVCache, init_cache
    from llama_jax.config import LlamaConfig
    from llama_jax.generation.config import GenerationConfig
    from llama_jax.generation.loop import GenerateOutput
    from llama_jax.generation.prompt_cache import PromptCache
    from llama_jax.loss import LossOutput, fused_linear_cross_entropy
    from llama_jax.models.calibration import quantize_calibrated
    from llama_jax.models.causal_lm import CausalLMOutput, LlamaForCausalLM
    from llama_jax.models.decoder import LlamaModel, ModelOutput
    from llama_jax.models.lm_head import (
        LMHead,
        LMHeadConfig,
        LMOutputWithLoss,
        NormalizedLMHead,
        RMSNormConfig,
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
    from llama_jax.models.token_classification import (
        LlamaForTokenClassification,
        TokenClassifierOutput,
    )
    from llama_jax.presets import PRESETS
    from llama_jax.quantization.model import Quantization, dequantize, quantize
    from llama_jax.sharding import parameter_shardings
    from llama_jax.text.tokenizer import load_tokenizer

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
    "PromptCache",
    "Quantization",
    "QuestionAnsweringModelOutput",
    "RMSNormConfig",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
    "dequantize",
    "fused_linear_cross_entropy",
    "init_cache",
    "load_tokenizer",
    "normalize_rows",
    "parameter_shardings",
    "quantize",
    "quantize_calibrated",
]

# where each of them is defined
_MODULE_OF = {
    "PRESETS": "presets",
    "CausalLMOutput": "models.causal_lm",
    "GenerateOutput": "generation.loop",
    "GenerationConfig": "generation.config",
    "KVCache": "attention.cache",
    "LMHead": "models.lm_head",
    "LMHeadConfig": "models.lm_head",
    "LMOutputWithLoss": "models.lm_head",
    "LlamaConfig": "config",
    "LlamaForCausalLM": "models.causal_lm",
    "LlamaForQuestionAnswering": "models.question_answering",
    "LlamaForSequenceClassification": "models.sequence_classification",
    "LlamaForTokenClassification": "models.token_classification",
    "LlamaModel": "models.decoder",
    "LossOutput": "loss",
    "ModelOutput": "models.decoder",
    "NormalizedLMHead": "models.lm_head",
    "PromptCache": "generation.prompt_cache",
    "Quantization": "quantization.model",
    "QuestionAnsweringModelOutput": "models.question_answering",
    "RMSNormConfig": "models.lm_head",
    "SequenceClassifierOutput": "models.sequence_classification",
    "TokenClassifierOutput": "models.token_classification",
    "dequantize": "quantization.model",
    "fused_linear_cross_entropy": "loss",
    "init_cache": "attention.cache",
    "load_tokenizer": "text.tokenizer",
    "normalize_rows": "models.lm_head",
    "parameter_shardings": "sharding",
    "quantize": "quantization.model",
    "quantize_calibrated": "models.calibration",
}

if not TYPE_CHECKING:  # or a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
