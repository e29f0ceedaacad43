"""PretrainedModel: loading from and saving to a Hugging Face directory."""

from pathlib import Path
from typing import Any, Self

from flax import nnx

from llama_jax.checkpoints import huggingface
from llama_jax.checkpoints.dtypes import requested_dtype
from llama_jax.config import LlamaConfig
from llama_jax.files.paths import source_path
from llama_jax.inputs.keys import require_rngs


class PretrainedModel(nnx.Module):
    """A module made from `(config, rngs=, dtype=)` whose parameters have transformers' names."""

    config: LlamaConfig

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: Any = None,
        *,
        torch_dtype: Any = None,
        adapter: str | Path | None = None,
        rngs: nnx.Rngs | None = None,
        dequantize: bool = True,
        **config_changes: Any,
    ) -> Self:
        """Load a model from a Hugging Face directory of safetensors, or from the Hub.

        As in transformers, the checkpoint may have another head than this class: a task head that it lacks
        is initialized at random. A missing language-model head is an error.

        Args:
            directory: with config.json and safetensors files, or a name on the Hub, "owner/name" or
                "owner/name@revision".
            dtype: of the weights: a dtype of JAX or torch, or its name; None and "auto" keep the
                stored one.
            torch_dtype: transformers' old name for `dtype`.
            adapter: directory, or name on the Hub, of a LoRA adapter of PEFT to merge into the model.
            rngs: seeds for task-head weights that the checkpoint lacks; default: `nnx.Rngs(0)`.
            dequantize: weights that another program quantized. If not, codes and scales are kept as a model
                that `quantize` made has them, where they are symmetric with 8 or 4 bits.
            config_changes: fields of config.json to override, such as `num_labels`.

        Raises:
            ValueError: `dtype` and `torch_dtype` differ; no such directory; a config that is damaged or not
                supported; or tensors that are missing, unexpected, duplicate, truncated, not finite or of
                the wrong shape, all in one message.
            TypeError: a keyword that is not a field of `LlamaConfig`.

        Warns:
            UserWarning: a task head was initialized at random; the message names its tensors.
        """
        dtype = _one_dtype(dtype, torch_dtype)
        if rngs is not None:
            require_rngs(rngs)
        directory = source_path(directory)
        config = LlamaConfig.from_pretrained(directory, **config_changes)
        model = huggingface.load(cls, config, directory, dtype, rngs, dequantize)
        if adapter is not None:
            model = huggingface.with_adapter(model, config, source_path(adapter))
        model._read_json_files(directory)
        return model

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        compressed_tensors: bool = False,
    ) -> None:
        """Write config.json and safetensors into a directory that transformers can load.

        Files are moved into `directory` once all of them are complete. A model saved there before is
        replaced; other files, such as a tokenizer's, are left alone.

        Args:
            directory: created if it does not exist.
            max_shard_size: upper limit of a file of weights, in bytes or as "5GB".
            compressed_tensors: store a quantized model in that format, with the same codes and scales, for
                vLLM and transformers. It must be quantized with `vocabulary=False` and, for 4 bits,
                `symmetric=True`.

        Raises:
            ValueError: `directory` is a file, max_shard_size is not a size, or compressed-tensors cannot
                hold the model.
        """
        huggingface.save(
            self,
            self.config,
            directory,
            max_shard_size=max_shard_size,
            json_files=self._json_files(),
            compressed_tensors=compressed_tensors,
        )

    def _read_json_files(self, directory: Path) -> None:
        """Take what the class keeps of the directory's further JSON files."""

    def _json_files(self) -> dict[str, Any]:
        """Further JSON files to save, by name."""
        return {}


def _one_dtype(dtype: Any, torch_dtype: Any) -> Any:
    """The dtype that either argument requests, or None."""
    first, second = map(requested_dtype, (dtype, torch_dtype))
    if None not in (first, second) and str(first) != str(second):
        raise ValueError(f"dtype: found {first} and torch_dtype {second}, expected only one")
    return second if first is None else first
