"""Names of recorded arrays, and which steps of a Llama they are.

A step is named as in the report: `embed_tokens`, `rotary.cos`, `layers.3.mlp.act`, `layers.3` for the
layer's output, `norm`, `lm_head`, `loss`. In a trace an array has the name of Hugging Face's module and
what it is of it: `model.layers.3.mlp.down_proj.input`.
"""

import re
from typing import Literal, NamedTuple

from parity_tests.report.programs.steps import AFTER_ATTENTION, LAYER_STEPS, OUTPUT

Kind = Literal["input", "value", "gradient", "weight gradient", "optimizer"]

INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids")
"""What a model is called with; not compared."""

COS, SIN = "rotary.cos", "rotary.sin"
_OPTIMIZER = ("stepped", "exp_avg", "exp_avg_sq", "momentum_buffer")
# steps that are no module's output, by the module whose input they are
_INPUT_OF = {
    "self_attn.o_proj": "self_attn.attention",
    "post_attention_layernorm": AFTER_ATTENTION,
    "mlp.down_proj": "mlp.act",
}
_ORDER = [*LAYER_STEPS]
_ORDER.insert(_ORDER.index("post_attention_layernorm"), AFTER_ATTENTION)


class Place(NamedTuple):
    """What an array is: the value of a step, its gradient, or something of a parameter."""

    kind: Kind
    name: str


def place(array: str) -> Place | None:
    """What an array of a trace is; None if the check does not know it.

    >>> place("model.layers.3.mlp.down_proj.input")
    Place(kind='value', name='layers.3.mlp.act')
    >>> place("model.layers.3.mlp.down_proj.weight.grad")
    Place(kind='weight gradient', name='model.layers.3.mlp.down_proj.weight')
    """
    if array in INPUTS:
        return Place("input", array)
    if array == "loss":
        return Place("value", "loss")
    owner, _, what = array.rpartition(".")
    if owner.endswith((".weight", ".bias")):
        if what == "grad":
            return Place("weight gradient", owner)
        return Place("optimizer", owner) if what in _OPTIMIZER else None
    if array in ("model.rotary_emb.cos", "model.rotary_emb.sin"):
        return Place("value", COS if what == "cos" else SIN)
    kind: Kind = "gradient" if what.endswith("_grad") else "value"
    side = what.removesuffix("_grad")
    step = owner.removeprefix("model.")
    layer = re.fullmatch(r"layers\.(\d+)(?:\.(.+))?", step)
    if side == "input" and layer is not None and layer[2] in _INPUT_OF:
        return Place(kind, f"layers.{layer[1]}.{_INPUT_OF[layer[2]]}")
    if side != "output" or not (
        step in ("embed_tokens", "norm", "lm_head")
        or (layer is not None and (layer[2] or OUTPUT) in LAYER_STEPS)
    ):
        return None
    return Place(kind, step)


def array_of(step: str, *, gradient: bool = False) -> str:
    """The name in a trace of a step's value or gradient.

    >>> array_of("layers.3.mlp.act", gradient=True)
    'model.layers.3.mlp.down_proj.input_grad'
    """
    suffix = "_grad" if gradient else ""
    if step == "loss":
        return "loss"
    if step in (COS, SIN):
        return f"model.rotary_emb.{step.removeprefix('rotary.')}"
    for module, value in _INPUT_OF.items():
        if step.endswith(f".{value}"):
            return f"model.{step.removesuffix(value)}{module}.input{suffix}"
    return f"{'' if step == 'lm_head' else 'model.'}{step}.output{suffix}"


def sections(layers: int) -> list[str]:
    """The parts of a model that the check runs one at a time, in forward order."""
    return ["embedding", *(f"layers.{index}" for index in range(layers)), "head"]


def section_of(step: str) -> str:
    """The section that computes a step."""
    layer = re.match(r"layers\.\d+", step)
    if layer:
        return layer[0]
    return "head" if step in ("norm", "lm_head", "loss") else "embedding"


def steps_of(section: str) -> list[str]:
    """The steps of a section, in forward order."""
    if section == "embedding":
        return ["embed_tokens", COS, SIN]
    if section == "head":
        return ["norm", "lm_head", "loss"]
    return [f"{section}.{step}" if step != OUTPUT else section for step in _ORDER]


def input_of(section: str, layers: int) -> str | None:
    """The step of an earlier section that a section reads."""
    if section == "embedding":
        return None
    index = layers if section == "head" else int(section.removeprefix("layers."))
    return f"layers.{index - 1}" if index else "embed_tokens"


def output_of(section: str) -> str:
    """The last step of a section."""
    return {"embedding": "embed_tokens", "head": "loss"}.get(section, section)
