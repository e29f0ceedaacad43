"""A causal model, its config and its tokenizer from whatever directory holds one."""

from pathlib import Path
from typing import Any

from llama_jax.checkpoints.orbax import is_orbax, load_orbax, locate
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import describe
from llama_jax.generation.config import read_generation_config
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.text.companions import tokenizer_home


def load_model(directory: str | Path, dtype: Any = None) -> LlamaForCausalLM:
    """The model of a Hugging Face or an Orbax directory, in `dtype` or (None, "auto") as stored.

    Raises:
        ValueError: something else, saying what it is and what to do with it.
    """
    directory = _readable(directory)
    if is_orbax(directory):
        model = load_orbax(LlamaForCausalLM, directory, dtype)
        model.generation_config = read_generation_config(_home(directory), model.config)
        return model
    return LlamaForCausalLM.from_pretrained(directory, dtype=dtype)


def load_config(directory: str | Path) -> LlamaConfig:
    """The config of what `load_model` loads. Raises ValueError as it does."""
    return LlamaConfig.from_pretrained(_home(_readable(directory)))


def tokenizer_directory(directory: str | Path) -> Path:
    """Where a directory has its tokenizer and templates: a run of `python -m train` in one of its own."""
    return tokenizer_home(_home(_readable(directory)))


def companions_directory(directory: str | Path) -> Path:
    """The directory with the companions (`llama_jax.text.companions`) of what `load_model` loads."""
    return _home(_readable(directory))


def _home(directory: Path) -> Path:
    return locate(directory)[0] if is_orbax(directory) else directory


def _readable(directory: str | Path) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: {describe(directory)}")
    return directory
