"""Configurations by name: published text models, from their Hugging Face repositories, and small ones.

Base and instruct models share an architecture; token ids are those of the base models.
"""

from llama_jax.config import LlamaConfig


def _llama1(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    )


def _llama2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llama3(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    *,
    context: int,
    scaling: float | None,
    tied: bool = False,
) -> LlamaConfig:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 500000.0}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=tied,
        rope_parameters=rope,
    )


def _small(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab_size: int,
    *,
    tied: bool,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )


def _smollm2(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    theta: float,
    initializer_range: float,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        initializer_range=initializer_range,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


# For pretraining from scratch; `python -m train` sets the vocabulary size of its data.
SMALL: dict[str, LlamaConfig] = {
    "tiny-4m": _small(256, 704, 4, 4, 2, 4096, tied=True),
    "small-56m": _small(512, 1376, 8, 8, 4, 32000, tied=False),
}

PRESETS: dict[str, LlamaConfig] = {
    "llama-7b": _llama1(4096, 11008, 32, 32),
    "llama-13b": _llama1(5120, 13824, 40, 40),
    "llama-30b": _llama1(6656, 17920, 60, 52),
    "llama-65b": _llama1(8192, 22016, 80, 64),
    "llama-2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama3(4096, 14336, 32, 32, context=8192, scaling=None),
    "llama-3-70b": _llama3(8192, 28672, 80, 64, context=8192, scaling=None),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, context=131072, scaling=8.0),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, context=131072, scaling=8.0),
    "llama-3.1-405b": _llama3(16384, 53248, 126, 128, context=131072, scaling=8.0),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, context=131072, scaling=32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, context=131072, scaling=32.0, tied=True),
    "tinyllama-1.1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
    ),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 100000.0, 1 / 24),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 100000.0, 0.02),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 130000.0, 0.02),
} | SMALL
"""Configurations by name; `python -m llama_jax info` lists them."""
