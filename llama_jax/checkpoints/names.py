"""Names of Hugging Face tensors, and which parameter of a model each belongs to.

Parameters carry transformers' names and PyTorch's layout. The only difference is that layers are stacked:
`model.layers.self_attn.q_proj.weight` [layers, out, in] is the stack of
`model.layers.{i}.self_attn.q_proj.weight` [out, in].
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax import nnx

ParamPath = tuple[str, ...]

LM_HEAD = "lm_head.weight"

# Task heads. A checkpoint without one, or with another task's, is the usual start of training.
TASK_HEADS = ("score.", "qa_outputs.")

# the decoder's tensors, with the prefixes of transformers' classes
DECODER_NAME = re.compile(r"(?P<prefix>model\.|transformer\.|)(embed_tokens|layers|norm)\.")

# what wrappers put into names: torch.compile, FSDP, activation checkpointing, DeepSpeed
_WRAPPERS = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)

# what classes around the model put before every name: DDP's `module.`, Lightning's `model.`, PEFT's
# `base_model.model.`
_OUTER = re.compile(rf"(?P<outer>(?:[A-Za-z_]\w*\.)*?){DECODER_NAME.pattern}")

# tensors of a PEFT adapter
LOW_RANK = re.compile(
    r"\.lora_([A-Z]|embedding_[A-Z]|magnitude_vector)|\.(base_layer|modules_to_save|original_module)\."
)

_ROTARY_BUFFERS = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached"))


@dataclass(frozen=True)
class ParamSlice:
    """Where a tensor goes: a parameter or, if `layer` is not None, one layer of a stacked parameter."""

    path: ParamPath
    layer: int | None


def name_table(model: nnx.Module) -> dict[str, ParamSlice]:
    """Hugging Face name -> parameter, for every tensor of a model, an abstract model or a gradient.

    >>> from llama_jax import LlamaConfig, LlamaModel
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model = nnx.eval_shape(lambda: LlamaModel(config, rngs=nnx.Rngs(0)))
    >>> name_table(model)["layers.1.mlp.up_proj.weight"]
    ParamSlice(path=('layers', 'mlp', 'up_proj', 'weight'), layer=1)
    """
    table: dict[str, ParamSlice] = {}
    for path, leaf in flat_params(model).items():
        if "layers" not in path:
            table[".".join(path)] = ParamSlice(path, None)
            continue
        before, after = path[: path.index("layers")], path[path.index("layers") + 1 :]
        for layer in range(leaf.shape[0]):
            table[".".join((*before, "layers", str(layer), *after))] = ParamSlice(path, layer)
    return table


def flat_params(model: nnx.Module) -> dict[ParamPath, Any]:
    """Path -> array (or shape) of every parameter."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {tuple(map(str, path)): variable.get_value() for path, variable in flat}


def is_code(name: str) -> bool:
    """Whether a tensor holds the integers of a quantized weight."""
    return name.endswith(".weight.codes")


def is_buffer(name: str) -> bool:
    """Whether a tensor holds rotary frequencies, which old checkpoints store and the config determines."""
    return name.endswith(_ROTARY_BUFFERS)


def without_wrappers(name: str) -> str:
    """A tensor's name without the segments of torch.compile, FSDP and activation checkpointing.

    >>> without_wrappers("_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return _WRAPPERS.sub("", name)


class Unwrapped(NamedTuple):
    """A tensor's name without what wrappers put into it; `wrappers` is what that was, for people."""

    name: str
    wrappers: str


def unwrap_names(names: Sequence[str]) -> dict[str, Unwrapped]:
    """Names as the bare model has them: without the segments of wrappers, and without a common prefix."""
    inner = {name: without_wrappers(name) for name in names}
    outer = next((match["outer"] for match in map(_OUTER.match, inner.values()) if match), "")
    if not all(name.startswith(outer) for name in inner.values()):
        outer = ""  # a model beside others, or a mixture: reported as it is
    return {
        name: Unwrapped(
            short.removeprefix(outer),
            ", ".join(sorted({*_WRAPPERS.findall(name), *([outer] if outer else [])})),
        )
        for name, short in inner.items()
    }


def partial_prefix(names: Iterable[str], table: Mapping[str, ParamSlice]) -> str:
    """A prefix that some names have and the model's do not; "" if there is none."""
    matches = (_OUTER.match(name) for name in names if name not in table)
    outers = {match["outer"] for match in matches if match}
    return next((outer for outer in sorted(outers) if outer), "")


def decoder_prefix(names: Iterable[str]) -> str:
    """The prefix of the decoder's names; "" for the bare decoder."""
    return next(match["prefix"] for match in map(DECODER_NAME.match, names) if match)
