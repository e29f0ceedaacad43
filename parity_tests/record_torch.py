"""Record what a Llama in PyTorch computes, to be checked on another machine.

This file needs torch, safetensors and the standard library; copy it to wherever the model runs.

    python record_torch.py HF_DIR --out TRACE             a checkpoint, by transformers

    from record_torch import record, recording

    record(model, ids, "TRACE")                           any model, for one forward and backward pass
    with recording(model, "TRACE") as trace:              a training step of your own
        loss = cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        trace.loss(loss, labels=ids)
        loss.backward()
        trace.step(optimizer)

A trace is a folder: safetensors files, one for each layer and direction, and manifest.json, written
last. In a checkout of the project, `python -m parity_tests check TRACE --model HF_DIR` then says whether
the model computes what its checkpoint should compute, and where it departs first. At most one layer's
arrays are held in memory.

Arrays are named after Hugging Face's modules, whatever the model calls its own:
`model.layers.3.mlp.up_proj` and then `.output` or `.input`; `.output_grad` or `.input_grad` for the
gradient of the loss with respect to that array; `.weight.grad` for a parameter's. Models of Hugging Face,
Meta, torchtitan and LitGPT are recognized. For any other, `names` maps its modules to Hugging Face's:

    names = {
        "blocks.{layer}": "model.layers.{layer}",
        "blocks.{layer}.attn.q": "model.layers.{layer}.self_attn.q_proj:pairs",
        "blocks.{layer}.attn.kv": ("model.layers.{layer}.self_attn.k_proj:pairs",
                                   "model.layers.{layer}.self_attn.v_proj"),
        ...
    }

A tuple is a fused projection, whose output has the parts side by side; with `:groups` at each part, one
key/value head after the other, each with its query heads before it. `:pairs` marks projections whose rows
are in Meta's order, where the two features that rotary embeddings turn together are neighbours.

Wrappers (DDP, FSDP2, torch.compile, activation checkpointing) are looked through. What torch.compile
compiled runs without it while it is recorded. Under FSDP2, record on every rank, each into a folder of its
own and with the same ids, for gradients are means over the ranks.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

FORMAT = 1
NameMap = Mapping[str, str | tuple[str, ...]]

_LAYER = "model.layers.{layer}"
_MODULES = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("self_attn.o_proj", "post_attention_layernorm"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
# modules whose input is recorded too: it is the output of none
_WITH_INPUT = ("self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")
_ROTARY = "model.rotary_emb"
# of an optimizer's groups; the check refuses a step with one of the last four
_SETTINGS = (
    *("lr", "betas", "eps", "weight_decay", "momentum", "decoupled_weight_decay"),
    *("amsgrad", "dampening", "maximize", "nesterov"),
)
_NOT_ONCE = "the model was called {} times while recording, expected once"


def _map(ends: tuple[str, str, str], layer: str, modules: NameMap) -> NameMap:
    """Of embedding, final norm and head; of the layers; and of the modules in a layer."""

    def in_layer(name: str) -> str:
        return f"{_LAYER}.{name}"

    return {
        ends[0]: "model.embed_tokens",
        layer: _LAYER,
        **{
            f"{layer}.{module}": in_layer(to) if isinstance(to, str) else tuple(map(in_layer, to))
            for module, to in modules.items()
        },
        ends[1]: "model.norm",
        ends[2]: "lm_head",
    }


HUGGING_FACE = _map(
    ("model.embed_tokens", "model.norm", "lm_head"), _LAYER, {name: name for name in _MODULES}
)


def _meta(head: str, projections: NameMap) -> NameMap:
    return _map(
        ("tok_embeddings", "norm", head),
        "layers.{layer}",
        {
            "attention_norm": "input_layernorm",
            **{f"attention.{name}": to for name, to in projections.items()},
            "attention.wo": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w3": "mlp.up_proj",
            "feed_forward.w2": "mlp.down_proj",
        },
    )


def _litgpt(name: str, parts: tuple[str, ...]) -> NameMap:
    return _map(
        ("transformer.wte", "transformer.ln_f", "lm_head"),
        "transformer.h.{layer}",
        {
            "norm_1": "input_layernorm",
            f"attn.{name}": parts,
            "attn.proj": "self_attn.o_proj",
            "norm_2": "post_attention_layernorm",
            "mlp.fc_1": "mlp.gate_proj",
            "mlp.fc_2": "mlp.up_proj",
            "mlp.proj": "mlp.down_proj",
        },
    )


_QKV = {"wq": "self_attn.q_proj:pairs", "wk": "self_attn.k_proj:pairs", "wv": "self_attn.v_proj"}
_PARTS = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
META = _meta("output", _QKV)  # and torchtitan before 0.3
KNOWN = {
    "Hugging Face": HUGGING_FACE,
    "Meta": META,
    "torchtitan": _meta("lm_head", {f"qkv_linear.{name}": to for name, to in _QKV.items()}),
    "torchtitan with fused projections": _meta(
        "lm_head", {"qkv_linear.wqkv": tuple(f"{to}:groups" for to in _QKV.values())}
    ),
    "LitGPT": _litgpt("qkv", _PARTS),
    "LitGPT before 0.5": _litgpt("attn", tuple(f"{name}:groups" for name in _PARTS)),
}


class Heads(NamedTuple):
    """Query heads, key/value heads and the size of one."""

    query: int
    key: int
    dim: int


class _Part(NamedTuple):
    """A module of Hugging Face's within one of the model's: its rows, and whether pairs are neighbours."""

    name: str
    rows: slice | Tensor
    pairs: bool


def record(
    model: nn.Module,
    ids: Tensor,
    out: str | os.PathLike[str],
    *,
    labels: Tensor | None = None,
    names: NameMap | None = None,
    heads: tuple[int, int, int] | None = None,
    backward: bool = True,
    settings: Mapping[str, Any] | None = None,
    **inputs: Any,
) -> Path:
    """Run `model` once on `ids` and write a trace of it.

    The loss is transformers', or for other models the mean cross-entropy of the logits that they return.

    Args:
        model: a causal language model; in evaluation mode, unless it has no dropout.
        ids: token ids [B, T].
        out: the folder to write; must not exist.
        labels: [B, T], not shifted, -100 where none counts; default: `ids`.
        names, heads, settings: as for `recording`.
        backward: record gradients too.
        inputs: what else to call the model with, such as `attention_mask`, `position_ids` and transformers'
            `num_items_in_batch`.

    Returns:
        The folder.

    Raises:
        ValueError: as `recording`.
    """
    if not isinstance(ids, Tensor):
        raise ValueError("ids: expected a tensor of token ids [batch, length]")
    labels = ids if labels is None else labels
    if labels.shape != ids.shape:
        raise ValueError(f"labels: found {list(labels.shape)}, expected {list(ids.shape)}")
    with recording(model, out, names=names, heads=heads, settings=settings) as trace:
        vocabulary = _rows(trace.parameters, "model.embed_tokens.weight")
        if labels is not ids:
            _require_tokens("labels", labels[labels != -100], vocabulary)
        with contextlib.nullcontext() if backward else torch.no_grad():
            if hasattr(model, "config") and hasattr(model, "generate"):
                loss = model(input_ids=ids, labels=labels, **inputs).loss
            else:
                logits = _first_tensor(model(ids, **inputs))
                targets = labels[:, 1:].flatten().to(logits.device)
                wide = torch.promote_types(logits.dtype, torch.float32)
                loss = cross_entropy(logits[:, :-1].flatten(0, 1).to(wide), targets)
        trace.loss(loss, labels=labels)
        if backward and not loss.requires_grad:
            raise ValueError("no parameter requires a gradient: give backward=False")
        if backward:
            loss.backward()
    if backward:
        model.zero_grad(set_to_none=True)
    return trace.folder


@contextlib.contextmanager
def recording(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    names: NameMap | None = None,
    heads: tuple[int, int, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Iterator["Recorder"]:
    """Record the one call of `model` within the block, and its backward pass if there is one.

    How large the trace will be is printed on stderr before anything is written.

    Args:
        model: a causal language model that is called with token ids [B, T].
        out: the folder to write; must not exist. After an error nothing is left of it.
        names: the model's modules by Hugging Face's names, see above; default: found by itself.
        heads: query heads, key/value heads, size of a head; needed for `:pairs` and fused projections,
            default: those of `model.config`.
        settings: of precision, what cannot be seen from here: `matmul` is "float32", "tf32", "bfloat16" or
            "float16", the format to which operands of float32 matmuls are rounded.
        quiet: print nothing.

    Raises:
        ValueError: torch is too old, names that are not the model's, a folder that exists, too little room
            on its disk, gradients from before, or more or fewer than one call.
    """
    _require_hooks()
    recorder = Recorder(model, Path(out), names, heads, settings or {}, quiet)
    with recorder:
        yield recorder


class Recorder:
    """Hooks on a model and the folder that they write to; made by `recording`."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        names: NameMap | None,
        heads: tuple[int, int, int] | None,
        settings: Mapping[str, Any],
        quiet: bool,
    ) -> None:
        if os.path.lexists(folder):
            raise ValueError(f"{folder}: exists, expected a new folder")
        if not folder.absolute().parent.is_dir():
            raise ValueError(f"{folder.parent}: no such directory")
        self.model, self.folder, self.settings, self.quiet = model, folder, settings, quiet
        if heads is not None and (len(heads) != 3 or any(not isinstance(n, int) for n in heads)):
            raise ValueError(f"heads: found {heads}, expected (query, key/value, size of a head)")
        self.heads = _heads(model) if heads is None else Heads(*heads)
        self.modules = _modules(model, _known_names(model) if names is None else names, self.heads)
        self.parameters = dict(_parameters(self.modules))
        if any(parameter.grad is not None for _, parameter in self.parameters.values()):
            raise ValueError("the model has gradients already: call model.zero_grad() first")
        self._handles: list[Any] = []
        self._stack = contextlib.ExitStack()
        self._calls, self._layer = 0, ""
        self._outputs: set[str] = set()
        self._dtypes: set[str] = set()
        self._manifest: dict[str, Any] = {}
        self._writer = _Writer(folder.with_name(f".{folder.name}.{os.getpid()}.partial"))

    def __enter__(self) -> "Recorder":
        try:
            self._writer.folder.mkdir()
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be written ({error.strerror})") from None
        try:
            self._hook()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._stack.close()
        for handle in self._handles:
            handle.remove()
        try:
            if kind is None:
                if self._calls != 1:
                    raise ValueError(_NOT_ONCE.format(self._calls))
                self._add_other_gradients()
                self._finish()
        finally:
            shutil.rmtree(self._writer.folder, ignore_errors=True)

    def loss(
        self, loss: Tensor, labels: Tensor | None = None, num_items: float | Tensor | None = None
    ) -> None:
        """Record the loss, and the labels [B, T] that it is of, not shifted.

        Args:
            num_items: what the sum over the labels was divided by, if not by the number of those that
                count: with gradient accumulation, that of all micro-batches.
        """
        if num_items is not None:
            self._manifest["num_items_in_batch"] = float(num_items)
        self._writer.add("loss", loss)
        if labels is not None:
            self._writer.add("labels", labels)

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> None:
        """Record an optimizer step, which is taken here.

        Args:
            optimizer: Adam, AdamW or SGD; steps with amsgrad, dampening, maximize or nesterov cannot be
                checked.
            max_norm: clip the gradient to this norm first, as `torch.nn.utils.clip_grad_norm_` does.
        """
        self._add_other_gradients()
        names: dict[int, list[str]] = {}  # a fused projection has several
        for name, (_, parameter) in self.parameters.items():
            names.setdefault(id(parameter), []).append(name)
        groups, steps = [], set()
        for group in optimizer.param_groups:
            of_group: list[str] = []
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                steps.add(int(state.get("step", 0)))
                for name in names.get(id(parameter), ()):
                    of_group.append(name)
                    for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                        self._add_parameter(f"{name}.{moment}", name, state.get(moment))
            settings = {key: _number(group[key]) for key in _SETTINGS if key in group}
            groups.append(settings | {"parameters": of_group})
        norm = None
        if max_norm is not None:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))
        optimizer.step()
        for name, (_, parameter) in self.parameters.items():
            self._add_parameter(f"{name}.stepped", name, parameter)
        self._manifest["optimizer"] = {
            "class": type(optimizer).__name__,
            "step": max(steps, default=0),
            "max_norm": max_norm,
            "norm": norm,
            "groups": groups,
        }

    def _hook(self) -> None:
        handles = self._handles
        handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for module, parts in self.modules:
            names = [part.name for part in parts]
            if re.fullmatch(r"model\.layers\.\d+", names[0]):
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, __, layer=names[0]: setattr(self, "_layer", layer)
                    )
                )
            if names[0].endswith(_WITH_INPUT):

                def record_input(_: Any, arguments: Any, options: Any, parts: Any = parts) -> None:
                    x = _first_tensor([*arguments, *options.values()])
                    self._activation(parts, "input", x)

                handles.append(module.register_forward_pre_hook(record_input, with_kwargs=True))

            def record_output(_: Any, __: Any, output: Any, parts: Any = parts) -> None:
                self._activation(parts, "output", _first_tensor(output))

            handles.append(module.register_forward_hook(record_output))
        rotary = dict(self.model.named_modules()).get(_ROTARY)
        if rotary is not None:

            def record_angles(_: Any, __: Any, output: Any) -> None:
                if isinstance(output, tuple) and len(output) == 2:
                    for name, values in zip(("cos", "sin"), output, strict=True):
                        self._writer.add(f"{_ROTARY}.{name}", values)

            handles.append(rotary.register_forward_hook(record_angles))
        for name, (_, parameter) in self.parameters.items():
            if parameter.requires_grad:
                handles.append(
                    parameter.register_post_accumulate_grad_hook(
                        lambda p, name=name: self._add_parameter(f"{name}.grad", name, p.grad)
                    )
                )
        if hasattr(torch.compiler, "set_stance"):
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(_Attention(self))

    def _begin(self, _: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
        """The model is called: write what it is called with, and tell how large the trace will be."""
        self._calls += 1
        if self._calls > 1:
            raise ValueError(_NOT_ONCE.format(self._calls))
        ids = options.get("input_ids", arguments[0] if arguments else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise ValueError("the model was not called with token ids [batch, length]")
        if ids.numel() == 0:
            raise ValueError(
                f"input_ids: found shape {list(ids.shape)}, expected at least one token"
            )
        vocabulary = _rows(self.parameters, "model.embed_tokens.weight")
        _require_tokens("input_ids", ids, vocabulary)
        size = self._size(*ids.shape)
        room = shutil.disk_usage(self._writer.folder).free
        if size > room:
            raise ValueError(
                f"{self.folder}: the trace takes about {_size(size)}, and {_size(room)} are free"
            )
        if not self.quiet:
            print(f"recording about {_size(size)} into {self.folder}", file=sys.stderr)
        inputs = {"input_ids": ids} | {
            name: options[name]
            for name in ("attention_mask", "position_ids", "segment_ids")
            if isinstance(options.get(name), Tensor)
        }
        if "attention_mask" in inputs and inputs["attention_mask"].ndim == 4:
            inputs |= _mask_and_segments(inputs.pop("attention_mask"))
        for name, values in inputs.items():
            self._writer.add(name, values)
        if (items := options.get("num_items_in_batch")) is not None:
            self._manifest["num_items_in_batch"] = float(items)
        self._manifest |= self._facts()

    def _size(self, batch: int, length: int) -> int:
        """Bytes of the trace."""
        size, with_gradient = 0, torch.is_grad_enabled()
        hidden = itemsize = 0
        for module, parts in self.modules:
            weight: Any = getattr(module, "weight", None)
            width = hidden if weight is None else weight.shape[0]
            if weight is not None:
                itemsize = weight.element_size()
            if weight is not None and parts[0].name == "model.embed_tokens":
                width = hidden = weight.shape[-1]
            if parts[0].name.endswith(_WITH_INPUT) and weight is not None:
                width += weight.shape[-1]
            if parts[0].name.endswith(("q_proj", "k_proj")):
                heads = (
                    (self.heads.query + self.heads.key) * self.heads.dim
                    if len(parts) > 1
                    else width
                )
                width += heads  # rotated
            size += batch * length * width * itemsize * (1 + with_gradient)
        if with_gradient:
            tensors = {id(p): p.numel() * p.element_size() for _, p in self.parameters.values()}
            size += sum(tensors.values())
        return size

    def _activation(self, parts: Sequence[_Part], kind: str, tensor: Tensor | None) -> None:
        """Record an output or input of a module, and later its gradient."""
        if tensor is None or self._calls != 1 or f"{parts[0].name}.{kind}" in self._outputs:
            return  # a layer that is computed again for its gradient
        self._outputs.add(f"{parts[0].name}.{kind}")
        self._add_parts(parts, kind, tensor)
        if kind == "output":
            self._dtypes.add(str(tensor.dtype).removeprefix("torch."))
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self._add_parts(parts, f"{kind}_grad", grad))

    def _add_parts(self, parts: Sequence[_Part], kind: str, tensor: Tensor) -> None:
        for part in parts:
            values = tensor if kind.startswith("input") else tensor[..., part.rows]
            if part.pairs:
                values = _halves(values, -1, self.heads.dim)
            self._writer.add(f"{part.name}.{kind}", values)

    def _add_parameter(self, name: str, of: str, values: Tensor | None) -> None:
        if values is not None:
            self._writer.add(
                name, _in_hugging_faces_rows(_whole(values), self.parameters[of][0], self.heads)
            )

    def _add_other_gradients(self) -> None:
        """Those that come without autograd's accumulation, as FSDP2's do."""
        for name, (_, parameter) in self.parameters.items():
            if f"{name}.grad" not in self._writer:
                self._add_parameter(f"{name}.grad", name, parameter.grad)

    def dropout(self, share: float) -> None:
        """State that values are dropped: no two such runs compute the same."""
        if share > self._manifest.get("dropout", 0.0):
            self._manifest["dropout"] = share

    def attention(self, query: Tensor, key: Tensor) -> None:
        """Record rotated queries and keys [B, heads, T, D], as attention gets them."""
        name = f"{self._layer}.self_attn.rotate"
        if not self._layer or self._calls != 1 or f"{name}.q" in self._outputs or query.ndim != 4:
            return
        if (
            self.heads.dim == 0
            or query.shape[1] != self.heads.query
            or query.requires_grad != key.requires_grad
        ):
            return
        self._outputs.add(f"{name}.q")
        pairs = any(part.pairs for _, parts in self.modules for part in parts)
        group = key.shape[1] // self.heads.key

        def add(which: str, kind: str, values: Tensor) -> None:
            if which == "k" and group > 1:  # repeated for every query head
                values = values.unflatten(1, (-1, group))
                values = values.sum(2) if kind == "output_grad" else values[:, :, 0]
            values = values.transpose(1, 2)
            if pairs:
                values = _halves(values, -1, self.heads.dim)
            self._writer.add(f"{name}.{which}.{kind}", values)

        for which, tensor in (("q", query), ("k", key)):
            add(which, "output", tensor)
            if tensor.requires_grad:
                tensor.register_hook(lambda grad, which=which: add(which, "output_grad", grad))

    def _facts(self) -> dict[str, Any]:
        """What the manifest says of model and machine, when the model is called."""
        device = next(self.model.parameters()).device.type
        autocast = None
        if torch.is_autocast_enabled(device):
            autocast = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        model: Any = _unwrapped(self.model)
        config: Any = getattr(model, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else None
        weights = {
            name: _digest(_in_hugging_faces_rows(_whole(parameter.detach()), part, self.heads))
            for name, (part, parameter) in self.parameters.items()
        }
        precision = {
            "parameters": _only({str(p.dtype) for p in self.model.parameters()}),
            "autocast": autocast,
            "matmul": _matmul_precision(device),
            "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        }
        return {
            "format": FORMAT,
            "program": f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__}
            | _versions(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "precision": precision | dict(self.settings),
            "shape": {
                "vocab_size": _rows(self.parameters, "model.embed_tokens.weight"),
                "num_hidden_layers": 1 + max(_layers(self.modules), default=-1),
                "num_attention_heads": self.heads.query or None,
                "num_key_value_heads": self.heads.key or None,
            },
            "config": config,
            "config_digest": config and hashlib.sha256(_json(config)).hexdigest(),
            "weights": weights,
            "weights_digest": hashlib.sha256(_json(weights)).hexdigest(),
        }

    def _finish(self) -> None:
        self._writer.flush()
        manifest = self._manifest | {"dtypes": sorted(self._dtypes), "arrays": self._writer.arrays}
        text = json.dumps(manifest, indent=1, default=str)
        (self._writer.folder / "manifest.json").write_text(text)
        if os.path.lexists(self.folder):
            raise ValueError(f"{self.folder}: was written by another program in the meantime")
        self._writer.folder.rename(self.folder)


def _mask_and_segments(mask: Tensor) -> dict[str, Tensor]:
    """[B, T] each, of a mask [B, 1, T, T] that is true or 0 where a query sees a key.

    Raises:
        ValueError: a mask that is neither of padding nor of documents in a row.
    """
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    _, heads, queries, keys = sees.shape
    if heads != 1 or queries != keys:
        raise ValueError(f"attention_mask: found {list(mask.shape)}, expected [batch, 1, T, T]")
    sees = sees[:, 0]
    shown = sees.any(1)
    # a document begins where a token does not see the one before
    apart = ~sees.diagonal(-1, 1, 2) & shown[:, 1:] & shown[:, :-1]
    segments = nn.functional.pad(apart.long().cumsum(1), (1, 0))
    causal = torch.ones(queries, keys, dtype=torch.bool, device=sees.device).tril()
    same = segments[:, :, None] == segments[:, None]
    if not torch.equal(
        sees & shown[:, :, None], causal & same & shown[:, None] & shown[:, :, None]
    ):
        raise ValueError(
            "attention_mask: found one that is not causal, or hides more than padding and other documents"
        )
    found = {} if shown.all() else {"attention_mask": shown.long()}
    return found | ({"segment_ids": segments} if segments.any() else {})


class _Attention(TorchFunctionMode):
    """Shows the recorder what `scaled_dot_product_attention` is called with, and whether dropout is on."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        if function is scaled_dot_product_attention:
            order = ("query", "key", "value", "attn_mask", "dropout_p")
            named = dict(zip(order, arguments, strict=False)) | options
            self.recorder.attention(named["query"], named["key"])
            self.recorder.dropout(named.get("dropout_p", 0.0))
        if function is torch.nn.functional.dropout:
            named = dict(zip(("input", "p", "training"), arguments, strict=False)) | options
            self.recorder.dropout(named.get("p", 0.5) if named.get("training", True) else 0.0)
        return function(*arguments, **options)


class _Writer:
    """Writes arrays in the order of their coming, a file for each run of arrays of one section."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, dict[str, Any]] = {}
        self._section, self._files = "", 0
        self._held: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held or name in self.arrays

    def add(self, name: str, values: Tensor) -> None:
        section = section_of(name)
        if section != self._section:
            self.flush()
            self._section = section
        if name in self:
            raise ValueError(
                f"{name} is recorded twice; one backward pass can be recorded at a time"
            )
        # a copy: the model may change its own in place
        self._held[name] = _whole(values.detach()).to(
            "cpu", copy=True, memory_format=torch.contiguous_format
        )

    def flush(self) -> None:
        if not self._held:
            return
        file = f"{self._files:04d}-{self._section}.safetensors"
        save_file(self._held, self.folder / file)
        for name, values in self._held.items():
            dtype = str(values.dtype).removeprefix("torch.")
            self.arrays[name] = {"file": file, "shape": list(values.shape), "dtype": dtype}
        self._held.clear()
        self._files += 1


def section_of(name: str) -> str:
    """`layers.N` for what is in a layer, `embedding` or `head`."""
    layer = re.match(r"model\.(layers\.\d+)\.", name)
    if layer:
        return layer[1]
    return "head" if name.startswith(("model.norm", "lm_head", "loss", "labels")) else "embedding"


def _require_hooks() -> None:
    needed = (Tensor, "register_post_accumulate_grad_hook"), (torch, "get_autocast_dtype")
    if not all(hasattr(owner, name) for owner, name in needed):
        raise ValueError(
            f"torch {torch.__version__} lacks hooks on gradients, expected 2.4 or newer"
        )


_WRAPPERS = re.compile(
    r"^(?:(?:module|_orig_mod|_forward_module)\.)+"  # around the whole model, in any order
    r"|(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)(?:\.|$)"
)


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by their names without wrappers, which are not among them."""
    modules = {}
    for name, module in model.named_modules():
        modules[_WRAPPERS.sub("", name).removesuffix(".")] = (
            module  # a wrapper comes before its own
        )
    return modules


def _unwrapped(model: Any) -> Any:
    """The model in DDP, DeepSpeed or torch.compile."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    return model


def _whole(values: Tensor) -> Tensor:
    """The whole of a DTensor, which is sharded over processes."""
    gather = getattr(values, "full_tensor", None)
    return values if gather is None else gather()


def _known_names(model: nn.Module) -> NameMap:
    """The map that fits the model."""
    present = _named_modules(model)
    for names in KNOWN.values():
        if all(key.format(layer=0) in present for key in names):
            return names
    tried = ", ".join(KNOWN)
    raise ValueError(
        f"{type(model).__name__}: its modules have none of the names of {tried}; give names={{...}} for "
        f"its modules: {_some(present)}"
    )


def _modules(model: nn.Module, names: NameMap, heads: Heads) -> list[tuple[nn.Module, list[_Part]]]:
    """The model's modules with what they are in Hugging Face's names; in the model's order."""
    patterns = {re.compile(re.escape(key).replace(r"\{layer\}", r"(\d+)")): key for key in names}
    modules, used, seen = [], set(), set()
    for name, module in _named_modules(model).items():
        for pattern, key in patterns.items():
            match = pattern.fullmatch(name)
            if match is None:
                continue
            used.add(key)
            value = names[key]
            if not isinstance(value, str | tuple | list) or not all(
                isinstance(v, str) for v in value
            ):
                raise ValueError(f"names: {key!r}: found {value!r}, expected a name, or several")
            texts = [value] if isinstance(value, str) else list(value)
            texts = [text.format(layer=match[1] if match.groups() else "") for text in texts]
            parts = _split(texts, heads, module)
            for part in parts:
                if part.name in seen:
                    raise ValueError(f"names: two modules are {part.name}")
                if not re.fullmatch(_CANONICAL, part.name):
                    raise ValueError(f"names: {part.name} is no module of Hugging Face's Llama")
                seen.add(part.name)
            modules.append((module, parts))
    if not names:
        raise ValueError(f"names: found none, expected names of {_some(_named_modules(model))}")
    unused = [key for key in names if key not in used]
    if unused:
        present = _named_modules(model)
        raise ValueError(
            f"names: {unused[0]!r} is no module of the model, which has {_some(present)}"
        )
    return modules


_CANONICAL = (
    r"model\.(embed_tokens|norm|layers\.\d+(\.("
    + "|".join(map(re.escape, _MODULES))
    + r"))?)|lm_head"
)


def _split(texts: list[str], heads: Heads, module: nn.Module) -> list[_Part]:
    """The parts of a module, by the values of a name map."""
    names = [text.partition(":")[0] for text in texts]
    marks = [set(text.split(":")[1:]) for text in texts]
    for text, of_part in zip(texts, marks, strict=True):
        if unknown := sorted(of_part - {"pairs", "groups"}):
            raise ValueError(f"names: ':{unknown[0]}' in {text!r}, expected ':pairs' or ':groups'")
    pairs = ["pairs" in of_part for of_part in marks]
    by_group = ["groups" in of_part for of_part in marks]
    if heads.dim == 0 and (any(pairs) or any("_attn." in name for name in names[1:])):
        raise ValueError(
            "names: ':pairs' and fused projections need heads=(query, key/value, size)"
        )
    projections = len(names) > 1 and all(
        name.endswith(("q_proj", "k_proj", "v_proj")) for name in names
    )
    if any(by_group) and not (all(by_group) and projections):
        raise ValueError(
            f"names: ':groups' in {', '.join(texts)}; expected it at all of q_proj, k_proj, v_proj"
        )
    if len(names) == 1:
        return [_Part(names[0], slice(None), pairs[0])]
    rows = module.get_parameter("weight").shape[0]
    if projections:
        sizes = [
            heads.dim * (heads.query if name.endswith("q_proj") else heads.key) for name in names
        ]
    else:
        sizes = [rows // len(names)] * len(names)
    if sum(sizes) != rows:
        raise ValueError(
            f"names: {names[0]} and the other parts have {sum(sizes)} rows, the module {rows}"
        )
    groups = heads.key if all(by_group) else 1
    each = torch.arange(rows).view(groups, -1).split([size // groups for size in sizes], dim=1)
    return [
        _Part(
            name,
            index.flatten() if groups > 1 else slice(int(index[0, 0]), int(index[0, -1]) + 1),
            turned,
        )
        for name, index, turned in zip(names, each, pairs, strict=True)
    ]


def _parameters(
    modules: Iterable[tuple[nn.Module, list[_Part]]],
) -> Iterator[tuple[str, tuple[_Part, nn.Parameter]]]:
    """Hugging Face's names of the parameters; a tied one has its first."""
    seen: set[int] = set()
    for module, parts in modules:
        own = [(name, p) for name, p in module.named_parameters(recurse=False) if id(p) not in seen]
        for name, parameter in own:
            seen.add(id(parameter))
            for part in parts:
                yield f"{part.name}.{name}", (part, parameter)


def _in_hugging_faces_rows(values: Tensor, part: _Part, heads: Heads) -> Tensor:
    values = values[part.rows]
    return _halves(values, 0, heads.dim) if part.pairs else values


def _halves(values: Tensor, axis: int, dim: int) -> Tensor:
    """Features from Meta's order, pairs side by side, to Hugging Face's: first halves, then second."""
    pairs = values.unflatten(axis, (-1, dim // 2, 2))
    first = axis if axis >= 0 else axis - 2
    return pairs.transpose(first + 1, first + 2).flatten(first, first + 2)


def _heads(model: nn.Module) -> Heads:
    """What the model's config says: Hugging Face's names, LitGPT's, or Meta's and torchtitan's."""
    model = _unwrapped(model)
    configs = (getattr(model, name, None) for name in ("config", "params", "model_args"))
    config: Any = next((config for config in configs if config is not None), None)

    def of(*names: str) -> Any:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int) and value), 0)

    query = of("num_attention_heads", "n_head", "n_heads")
    key = of("num_key_value_heads", "n_query_groups", "n_kv_heads") or query
    hidden = of("hidden_size", "n_embd", "dim")
    return Heads(query, key, of("head_dim", "head_size") or (hidden // query if query else 0))


def _digest(values: Tensor) -> str:
    """SHA-256 of the values as float32 (float64 of float64), so that their dtype makes no difference."""
    if values.dtype != torch.float64:
        values = values.float()
    return hashlib.sha256(values.cpu().contiguous().numpy().data).hexdigest()


def _matmul_precision(device: str) -> str:
    """To what operands of float32 matmuls are rounded."""
    if device != "cuda":
        return "float32"
    tf32 = torch.backends.cuda.matmul.allow_tf32 and torch.cuda.get_device_capability() >= (8, 0)
    return "tf32" if tf32 else "float32"


def _versions() -> dict[str, str]:
    transformers = sys.modules.get("transformers")
    return {} if transformers is None else {"transformers": transformers.__version__}


def _layers(modules: Iterable[tuple[nn.Module, list[_Part]]]) -> Iterator[int]:
    for _, parts in modules:
        match = re.match(r"model\.layers\.(\d+)", parts[0].name)
        if match:
            yield int(match[1])


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _require_tokens(name: str, tokens: Tensor, vocabulary: int | None) -> None:
    outside = tokens[(tokens < 0) | (tokens >= (vocabulary or sys.maxsize))]
    if len(outside):
        expected = "0 or more" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise ValueError(f"{name}: found token {int(outside[0])}, expected {expected}")


def _number(value: Any) -> Any:
    """A setting of an optimizer, which may be a tensor, or two."""
    if isinstance(value, tuple):
        return [_number(each) for each in value]
    return value.item() if isinstance(value, Tensor) else value


def _rows(parameters: Mapping[str, tuple[_Part, nn.Parameter]], name: str) -> int | None:
    return parameters[name][1].shape[0] if name in parameters else None


def _only(dtypes: set[str]) -> str:
    return " ".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))


def _first_tensor(values: Any) -> Tensor:
    """The tensor in what a module takes or returns."""
    if isinstance(values, Tensor):
        return values
    if hasattr(values, "logits"):
        return values.logits
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None:
        raise ValueError("a module takes or returns no tensor")
    return found


def _some(names: Iterable[str], limit: int = 8) -> str:
    kinds = list(
        dict.fromkeys(re.sub(r"\b\d+\b", "{layer}", name) for name in sorted(names) if name)
    )
    return ", ".join(kinds[:limit]) + (", ..." if len(kinds) > limit else "")


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def main(arguments: list[str] | None = None) -> int:
    """Record a Hugging Face checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="record_torch.py", description="Record a Hugging Face checkpoint."
    )
    parser.add_argument("directory", metavar="HF_DIR")
    add_options(parser)
    try:
        run(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `run`, but for the directory."""
    parser.add_argument("--out", required=True, metavar="TRACE", help="folder to write")
    parser.add_argument(
        "--tokens",
        metavar="FILE",
        help="token ids, integers in text; default: a text, by the checkpoint's tokenizer",
    )
    parser.add_argument(
        "--length", type=int, metavar="N", default=512, help="tokens at most; default: 512"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="dtype of the weights")
    parser.add_argument("--autocast", choices=("bf16", "fp16"), help="record under autocast")
    parser.add_argument("--device", default="cpu", help="torch's name of it; default: cpu")
    parser.add_argument(
        "--attention", default="sdpa", help="transformers' name of it; default: sdpa"
    )
    parser.add_argument("--forward-only", action="store_true", help="leave out gradients")


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    directory: str | os.PathLike[str], dtype: torch.dtype, attention: str = "sdpa"
) -> nn.Module:
    """A checkpoint as transformers runs it, for evaluation. Raises ValueError."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError(
            "transformers is not installed; call record(model, ids, out) instead"
        ) from None
    if not Path(directory).is_dir():
        raise ValueError(f"{directory}: no such directory")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=attention
        )
    except Exception as error:  # of many types
        raise ValueError(f"{directory}: transformers cannot load it: {str(error)[:200]}") from None
    return model.eval()


def run(options: argparse.Namespace) -> Path:
    """Record the checkpoint in `options.directory`. Raises ValueError."""
    if options.length < 2:
        raise ValueError(f"--length: found {options.length}, expected at least 2")
    model = load(options.directory, _DTYPES[options.dtype], options.attention).to(options.device)
    config: Any = model.config
    if options.tokens is None:
        try:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(options.directory)
            ids = tokenizer(Path(__file__).read_text())["input_ids"]
        except Exception:  # of many types
            raise ValueError(f"{options.directory}: no tokenizer; give --tokens FILE") from None
    else:
        ids = _read_tokens(Path(options.tokens), config.vocab_size)
    length = min(options.length, getattr(config, "max_position_embeddings", options.length))
    tokens = torch.tensor([ids[:length]], device=options.device)
    if tokens.shape[1] < 2:
        raise ValueError(f"found {tokens.shape[1]} tokens, expected at least 2")
    autocast: Any = contextlib.nullcontext()
    if options.autocast:
        autocast = torch.autocast(options.device.partition(":")[0], _DTYPES[options.autocast])
    with autocast:
        return record(model, tokens, options.out, backward=not options.forward_only)


def _read_tokens(path: Path, vocabulary: int) -> list[int]:
    try:
        ids = [int(word) for word in path.read_text().replace(",", " ").split()]
    except ValueError:
        raise ValueError(
            f"{path}: expected token ids, integers separated by spaces or commas"
        ) from None
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ValueError(f"{path}: found token {token}, expected 0 to {vocabulary - 1}")
    return ids


if __name__ == "__main__":
    sys.exit(main())
