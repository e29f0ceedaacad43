"""PretrainedModel: what every Llama does with a Hugging Face directory."""

from pathlib import Path
from typing import Any, Self

from flax import nnx

from llama_jax.checkpoints import huggingface
from llama_jax.checkpoints.dtypes import requested_dtype
from llama_jax.config import LlamaConfig
from llama_jax.inputs.keys import require_rngs


def _one_dtype(dtype: Any, torch_dtype: Any) -> Any:
    """What both say; None where neither asks for one."""
    first, second = map(requested_dtype, (dtype, torch_dtype))
    if None not in (first, second) and str(first) != str(second):
        raise ValueError(f"dtype: found {first} beside torch_dtype {second}, expected one of them")
    return second if first is None else first


class PretrainedModel(nnx.Module):
    """A module of `(config, rngs=, dtype=)` whose parameters have transformers' names."""

    config: LlamaConfig

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: Any = None,
        *,
        torch_dtype: Any = None,
        rngs: nnx.Rngs | None = None,
        **config_changes: Any,
    ) -> Self:
        """Load a Hugging Face directory. See `huggingface.load`.

        Args:
            dtype: of the weights: JAX's, its name, or torch's; None and "auto" keep the stored one.
            torch_dtype: the same under transformers' old name.
            rngs: of the weights of a task's head that the directory has not; None is `nnx.Rngs(0)`.
            config_changes: fields of config.json to change, such as `num_labels`.

        Raises:
            ValueError: two dtypes that differ, or as `huggingface.load`.
            TypeError: a keyword that is no field of `LlamaConfig`.
        """
        dtype = _one_dtype(dtype, torch_dtype)
        if rngs is not None:
            require_rngs(rngs)
        config = LlamaConfig.from_pretrained(directory, **config_changes)
        return huggingface.load(cls, config, directory, dtype, rngs)

    def save_pretrained(self, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write a Hugging Face directory that both majors of transformers load. See `huggingface.save`."""
        huggingface.save(self, self.config, directory, max_shard_size=max_shard_size)
