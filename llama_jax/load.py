"""Load a causal LM, its config and its tokenizer from any supported directory or repository on the Hub."""

from pathlib import Path
from typing import Any

from llama_jax.checkpoints.huggingface import with_adapter
from llama_jax.checkpoints.orbax import is_orbax, load_orbax, locate
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import describe
from llama_jax.files.paths import source_path
from llama_jax.generation.config import read_generation_config
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.text.companions import tokenizer_home


def load_model(
    directory: str | Path, dtype: Any = None, *, adapter: str | Path | None = None
) -> LlamaForCausalLM:
    """Load a model from a Hugging Face directory, an Orbax directory, a training run or the Hub.

    Args:
        directory: or a name on the Hub, "owner/name" or "owner/name@revision".
        dtype: of the weights; None and "auto" keep the stored one.
        adapter: directory, or name on the Hub, of a LoRA adapter of PEFT to merge into the model.

    Raises:
        ValueError: anything else; the message says what it is and what to do.

    >>> from flax import nnx
    >>> from llama_jax import LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> LlamaForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained("tiny")
    >>> load_model("tiny").config.hidden_size
    16
    """
    directory = _readable(directory)
    if is_orbax(directory):
        model = load_orbax(LlamaForCausalLM, directory, dtype)
        if adapter is not None:
            model = with_adapter(model, model.config, source_path(adapter))
        model.generation_config = read_generation_config(_home(directory), model.config)
        return model
    return LlamaForCausalLM.from_pretrained(directory, dtype=dtype, adapter=adapter)


def load_config(directory: str | Path) -> LlamaConfig:
    """The config of the model that `load_model` loads. Raises the same errors."""
    return LlamaConfig.from_pretrained(_home(_readable(directory, weights=False)))


def tokenizer_directory(directory: str | Path) -> Path:
    """The directory of the tokenizer and chat templates; in a training run that is a subdirectory."""
    return tokenizer_home(_home(_readable(directory, weights=False)))


def companions_directory(directory: str | Path) -> Path:
    """The directory of the companion files (`llama_jax.text.companions`) of a model."""
    return _home(_readable(directory, weights=False))


def _home(directory: Path) -> Path:
    return locate(directory)[0] if is_orbax(directory) else directory


def _readable(directory: str | Path, *, weights: bool = True) -> Path:
    directory = source_path(directory, weights=weights)
    if not directory.is_dir():
        raise ValueError(f"{directory}: {describe(directory)}")
    return directory
