"""Names of Hugging Face's tensors and where each belongs in a model.

The table is literal. Our parameters carry transformers' names and PyTorch's layout; the one difference
is that layers are stacked, so `model.layers.self_attn.q_proj.weight` [layers, out, in] is the stack of
`model.layers.{i}.self_attn.q_proj.weight` [out, in].
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax import nnx

ParamPath = tuple[str, ...]

LM_HEAD = "lm_head.weight"

# Heads that are trained for a task. A checkpoint without them, or with another's, is where that starts.
TASK_HEADS = ("score.", "qa_outputs.")

# the decoder's tensors, under the prefixes that transformers' classes give them
_DECODER = re.compile(r"(?P<prefix>model\.|transformer\.|)(embed_tokens|layers|norm)\.")

# what wrappers put into the names of the modules they wrap: torch.compile, FSDP, activation checkpointing,
# DeepSpeed. No module of a model is called so.
_WRAPPERS = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)

# what others, and classes around the model, put before every name: DDP's `module.`, Lightning's `model.`,
# PEFT's `base_model.model.`
_OUTER = re.compile(rf"(?P<outer>(?:[A-Za-z_]\w*\.)*?){_DECODER.pattern}")

LOW_RANK = re.compile(
    r"\.lora_([A-Z]|embedding_[A-Z]|magnitude_vector)|\.(base_layer|modules_to_save|original_module)\."
)


@dataclass(frozen=True)
class Slot:
    """The place of one Hugging Face tensor: a parameter of ours and, in a stack, the layer."""

    path: ParamPath
    layer: int | None


def name_table(model: nnx.Module) -> dict[str, Slot]:
    """Every Hugging Face name of `model` (abstract or real, or its gradient) and its place in it."""
    table: dict[str, Slot] = {}
    for path, leaf in flat_params(model).items():
        if "layers" not in path:
            table[".".join(path)] = Slot(path, None)
            continue
        before, after = path[: path.index("layers")], path[path.index("layers") + 1 :]
        for layer in range(leaf.shape[0]):
            table[".".join((*before, "layers", str(layer), *after))] = Slot(path, layer)
    return table


def is_code(name: str) -> bool:
    """Whether a tensor is the integers of a quantised weight."""
    return name.endswith(".weight.codes")


def flat_params(model: nnx.Module) -> dict[ParamPath, Any]:
    """Path -> array (or shape) of every parameter."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {tuple(map(str, path)): variable.get_value() for path, variable in flat}


_ROTARY_BUFFERS = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached"))


def is_buffer(name: str) -> bool:
    """Old checkpoints store the rotary frequencies, which follow from the config."""
    return name.endswith(_ROTARY_BUFFERS)


class Unwrapped(NamedTuple):
    """A tensor's name without what wrappers put into it, and that."""

    name: str
    taken: str


def unwrapped(names: Sequence[str]) -> dict[str, Unwrapped]:
    """Each name without what wraps the model: wrappers' own segments, and what stands before every name."""
    inner = {name: _WRAPPERS.sub("", name) for name in names}
    outer = next((match["outer"] for match in map(_OUTER.match, inner.values()) if match), "")
    if not all(name.startswith(outer) for name in inner.values()):
        outer = ""  # a model beside others, or a mixture: said as it is
    return {
        name: Unwrapped(
            short.removeprefix(outer),
            ", ".join(sorted({*_WRAPPERS.findall(name), *([outer] if outer else [])})),
        )
        for name, short in inner.items()
    }


def prefix_of_some(stored: Mapping[str, Any], table: Mapping[str, Slot]) -> str:
    """A prefix without which names that are not of the model would be; "" where there is none."""
    matches = (_OUTER.match(name) for name in stored if name not in table)
    outers = {match["outer"] for match in matches if match}
    return next((outer for outer in sorted(outers) if outer), "")


def decoder_prefix(names: Iterable[str]) -> str:
    """What stands before the decoder's names: nothing for the bare decoder."""
    return next(match["prefix"] for match in map(_DECODER.match, names) if match)
