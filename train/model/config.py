"""The configuration of a run's model: that of a checkpoint, a file or a preset."""

from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.files.json_object import read_json_object
from llama_jax.presets import PRESETS, SMALL
from train.data.special_ids import SpecialIds, model_ids
from train.data.tokens import Vocabulary
from train.options import ModelOptions


def model_config(
    options: ModelOptions, vocabulary: Vocabulary | None, sequence_length: int
) -> LlamaConfig:
    """The model's configuration: from --model.init-from, from a file, or a preset.

    With --model.init-from the special tokens are those of the checkpoint, otherwise those of the data. A
    small preset also takes the vocabulary of the data, and positions for the sequences. --model.width
    replaces the width of a file's or a preset's.

    Raises:
        ValueError: an unknown preset; a vocabulary smaller than the data's; sequences longer than the
            model's positions.
    """
    if options.init_from is not None:
        name, config = str(options.init_from), LlamaConfig.from_pretrained(options.init_from)
    elif options.config is not None:
        name, path = str(options.config), options.config
        if path.is_file():
            config = LlamaConfig.from_dict(read_json_object(path))
        else:
            config = LlamaConfig.from_pretrained(path)
    elif options.preset in SMALL:
        name, small = options.preset, SMALL[options.preset].to_dict()
        longest = max(small["max_position_embeddings"], sequence_length)
        changes: dict[str, Any] = {"max_position_embeddings": longest}
        if vocabulary is not None:
            changes["vocab_size"] = vocabulary.vocab_size
        config = LlamaConfig.from_dict(small | changes)
    elif options.preset in PRESETS:
        name, config = options.preset, PRESETS[options.preset]
    else:
        raise ValueError(
            f"model.preset: found {options.preset!r}, expected one of {', '.join(PRESETS)}"
        )
    if options.width is not None:
        config = with_width(config, options.width, name)
    if vocabulary is not None and vocabulary.vocab_size > config.vocab_size:
        raise ValueError(
            f"{name}: found vocab_size {config.vocab_size}, expected at least {vocabulary.vocab_size}, "
            "the data's"
        )
    if vocabulary is not None and options.init_from is None:
        config = _with_special_ids(config, vocabulary)
    if sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"sequence-length: found {sequence_length}, expected at most "
            f"max_position_embeddings={config.max_position_embeddings} of {name}"
        )
    return config


def with_width(
    config: LlamaConfig, width: int, name: str, *, wider_heads: bool = False
) -> LlamaConfig:
    """The config with another hidden size, and MLP and heads in proportion.

    Args:
        name: of the config, for messages.
        wider_heads: as many heads as before, each wider or narrower; otherwise more or fewer of them.

    Raises:
        ValueError: one of them is then not a whole number, or heads of an odd size.
    """
    scaled = ["intermediate_size"]
    scaled += ["head_dim"] if wider_heads else ["num_attention_heads", "num_key_value_heads"]
    fields = config.to_dict() | {"hidden_size": width}
    for field in scaled:
        value, remainder = divmod(fields[field] * width, config.hidden_size)
        if remainder or (field == "head_dim" and value % 2):
            expected = "an even number" if field == "head_dim" else "a whole number"
            raise ValueError(
                f"model.width: found {width}, but {field} of {name}, {fields[field]} x {width} / "
                f"{config.hidden_size}, is not {expected}"
            )
        fields[field] = value
    return LlamaConfig.from_dict(fields)


def _with_special_ids(config: LlamaConfig, vocabulary: Vocabulary) -> LlamaConfig:
    """The config with the special tokens of the data; several end-of-text tokens are all kept."""
    ids: dict[str, Any] = model_ids(SpecialIds(vocabulary.bos_id, vocabulary.eos_id))
    if ids["eos_token_id"] in config.eos_token_ids:
        del ids["eos_token_id"]
    return LlamaConfig.from_dict(config.to_dict() | ids)
