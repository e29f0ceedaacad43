"""Read `torch.optim.AdamW.state_dict()`, saved as optimizer.pt beside the weights of a model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.checkpoints.match import abstract_model, compare_shapes
from llama_jax.checkpoints.names import name_table, unwrap_names
from llama_jax.checkpoints.safetensors_read import all_finite
from llama_jax.config import LlamaConfig
from llama_jax.files.json_object import read_json_object
from llama_jax.formatting import first_line, summarize
from llama_jax.models.causal_lm import LlamaForCausalLM
from train.options import OptimizerOptions
from train.program.optimizer import decays

FILE = "optimizer.pt"
NAMES = "optimizer.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
# where trainers put it in the dictionary that they save
_NESTED = ("optimizer", "optimizer_state_dict", "optim")
_LIGHTNING = "optimizer_states"  # a list
_TRAINER = "trainer_state.json"
_IN_LAYER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *("input_layernorm", "post_attention_layernorm"),
)


class TorchOptimizer(NamedTuple):
    """AdamW's state of a model.

    tensors: Hugging Face name -> the moments by torch's names.
    groups: Hugging Face name -> the hyperparameters of its group.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]]

    def read(self, moment: str, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Put a part of a moment into `out`. Raises ValueError for numbers that are not finite."""
        out[...] = _numpy(self.tensors[name][moment][index]).astype(out.dtype)
        if not all_finite(np.ascontiguousarray(out)):
            raise ValueError(
                f"{self.path}: {name}: {moment} holds non-finite values as {out.dtype}"
            )


def read_optimizer(directory: Path) -> TorchOptimizer:
    """The state in `directory`/optimizer.pt; its tensors stay in the file until they are read.

    Parameters are found by their names: torch saves them since 2.6 if the optimizer was made with
    `model.named_parameters()`; otherwise optimizer.json lists them, `{"param_names": [...]}`, in the
    optimizer's order. Beside a trainer_state.json it is that of transformers' Trainer.

    Raises:
        ValueError: torch is not installed; a file that is damaged, or not an AdamW's; no names, or not as
            many as parameters; moments or steps that are missing; parameters after different steps.
    """
    path = directory / FILE
    content = _load(path)
    content = next(
        (content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), content
    )
    listed = content.get(_LIGHTNING)
    if isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], Mapping):
        (content,) = listed
    states, groups = content.get("state"), content.get("param_groups")
    if not isinstance(states, Mapping) or not isinstance(groups, Sequence) or not groups:
        raise ValueError(f"{path}: not what torch.optim.AdamW.state_dict() returns")
    names = _names(path, groups)
    group_of = {
        names[key]: {field: value for field, value in group.items() if field != "params"}
        for group in groups
        for key in group["params"]
    }
    tensors: dict[str, dict[str, Any]] = {}
    steps: dict[int, str] = {}
    for key, state in states.items():
        name = names.get(key)
        if name is None:
            raise ValueError(f"{path}: found the state of a parameter {key!r} that is in no group")
        _require_adamw(state, f"{path}: {name}")
        tensors[name] = {field: state[field] for field in _MOMENTS}
        steps.setdefault(int(state["step"]), name)
    if missing := [name for name in group_of if name not in tensors]:
        raise ValueError(summarize(str(path), [f"{name}: has no moments" for name in missing]))
    if len(steps) != 1 or min(steps) < 1:
        shown = ", ".join(f"{step} at {name}" for step, name in sorted(steps.items())[:3])
        raise ValueError(
            f"{path}: found steps {shown or 'of nothing'}, expected the same of all, at least 1"
        )
    return TorchOptimizer(path, min(steps), tensors, group_of)


def require_fit(state: TorchOptimizer, config: LlamaConfig, optimizer: OptimizerOptions) -> None:
    """Raise ValueError unless the state is of a model of `config`, and of AdamW with these options."""
    abstract = abstract_model(LlamaForCausalLM, config, "float32")
    table = name_table(abstract)
    problems = []
    for moment in _MOMENTS:
        shapes = {name: tuple(tensors[moment].shape) for name, tensors in state.tensors.items()}
        problems += [f"{moment} of {line}" for line in compare_shapes(shapes, table, abstract)]
    if problems:
        raise ValueError(summarize(f"{state.path}: {len(problems)} problems", problems))
    decays_some = any(group.get("weight_decay") for group in state.groups.values())
    for name, group in state.groups.items():
        for unsupported in ("amsgrad", "maximize"):
            if group.get(unsupported):
                raise ValueError(
                    f"{state.path}: {name}: found {unsupported}, expected AdamW without it"
                )
        decay = optimizer.weight_decay if decays(name) else 0.0
        betas = tuple(group.get("betas", (None, None)))
        for option, actual, expected in (
            ("beta1", betas[0], optimizer.beta1),
            ("beta2", betas[1], optimizer.beta2),
            ("eps", group.get("eps"), optimizer.eps),
            ("weight-decay", group.get("weight_decay"), decay),
        ):
            if not isinstance(actual, int | float) or not math.isclose(actual, expected):
                remedy = f"pass --optimizer.{option}"
                if option == "weight-decay" and (not decays(name) or (actual == 0 and decays_some)):
                    remedy = "here weight decay applies to matrices, not to norms and biases"
                raise ValueError(
                    f"{state.path}: {name}: {option}: found {actual}, expected {expected}: {remedy}"
                )
        if decay and group.get("decoupled_weight_decay") is False:
            raise ValueError(
                f"{state.path}: {name}: found Adam's coupled weight decay, expected AdamW"
            )


def _require_adamw(state: Any, where: str) -> None:
    """Raise ValueError unless the state of a parameter has AdamW's moments and a whole number of steps."""
    import torch

    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: found a {type(state).__name__}, expected a dictionary")
    for field in ("step", *_MOMENTS):
        if field not in state:
            raise ValueError(
                f"{where}: found {', '.join(map(str, state)) or 'nothing'}, expected {field} too, as "
                "torch.optim.AdamW has it"
            )
    if "max_exp_avg_sq" in state:
        raise ValueError(f"{where}: found the state of amsgrad, expected plain AdamW's")
    step = state["step"]
    if isinstance(step, torch.Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, int | float) or not float(step).is_integer():
        raise ValueError(f"{where}: step: found {step}, expected a whole number")
    for moment in _MOMENTS:
        if not isinstance(state[moment], torch.Tensor):
            raise ValueError(
                f"{where}: {moment}: found a {type(state[moment]).__name__}, expected a tensor"
            )


def _load(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: torch is needed to read it; in the checkout: pip install '.[parity]'"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damage shows as any exception
        raise ValueError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected a dictionary")
    return content


def _names(path: Path, groups: Sequence[Any]) -> dict[Any, str]:
    """The name of each parameter, by its key in the state."""
    keys = _concatenated(groups, "params")
    if keys is None or not all(isinstance(key, int | str) for key in keys):
        raise ValueError(f"{path}: param_groups: not what torch.optim.AdamW writes")
    listed = path.with_name(NAMES)
    names: Any
    if all(isinstance(key, str) for key in keys):  # FSDP's
        names = keys
    elif all("param_names" in group for group in groups):
        names = _concatenated(groups, "param_names")
    elif listed.exists():
        names, path = read_json_object(listed).get("param_names"), listed
    elif (names := _trainers_names(path, groups)) is not None:
        pass
    else:
        raise ValueError(
            f"{path}: has no names of parameters: make the optimizer with model.named_parameters() (torch "
            f'2.6), or write them in its order to {listed.name}, {{"param_names": [...]}}'
        )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: param_names: not a list of names")
    if len(names) != len(keys) or len(set(names)) != len(names):
        raise ValueError(
            f"{path}: found {len(set(names))} different names, expected one for each of the {len(keys)} "
            "parameters"
        )
    unwrapped = unwrap_names(names)
    return {key: unwrapped[name].name for key, name in zip(keys, names, strict=True)}


def _trainers_names(path: Path, groups: Sequence[Any]) -> list[str] | None:
    """The names in the order of transformers' Trainer: those that decay, then the others.

    None for another program's file, and for groups of other sizes.
    """
    config = path.with_name("config.json")
    if not (path.with_name(_TRAINER).is_file() and config.is_file() and len(groups) == 2):
        return None
    names = _in_order(LlamaConfig.from_dict(read_json_object(config)))
    parts = [[name for name in names if decays(name) == first] for first in (True, False)]
    if [len(group["params"]) for group in groups] != [len(part) for part in parts]:
        return None
    return [name for part in parts for name in part]


def _in_order(config: LlamaConfig) -> list[str]:
    """The parameters of transformers' Llama in its order."""

    def has_bias(module: str) -> bool:
        return config.attention_bias if "attn" in module else config.mlp_bias and "mlp" in module

    names = ["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        for module in _IN_LAYER:
            name = f"model.layers.{layer}.{module}"
            names += [f"{name}.weight", *([f"{name}.bias"] if has_bias(module) else [])]
    return [
        *names,
        "model.norm.weight",
        *([] if config.tie_word_embeddings else ["lm_head.weight"]),
    ]


def _concatenated(groups: Sequence[Any], field: str) -> list[Any] | None:
    """What all groups have in their lists; None if a group is without one."""
    try:
        return [item for group in groups for item in group[field]]
    except (KeyError, TypeError):
        return None


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
