"""Recognize weights that this library does not read, and say what to do about them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ADAPTER_CONFIG = "adapter_config.json"
ORBAX_METADATA = "_METADATA"  # Orbax's description of a tree
# what trainers call the directory of one
ORBAX_TREES = ("items", "default", "state", "params", "model_params")
_CONVERT = "from a checkout of the repository: python -m convert"
# a pattern of file names, and what a directory with such a file is; the first match counts
_KINDS: tuple[tuple[str, str], ...] = (
    ("model_index.json", "a diffusers pipeline, not a language model"),
    (
        "pytorch_model*.bin",
        f"PyTorch weights ({{file}}); convert them to safetensors, {_CONVERT} {{path}} DIR",
    ),
    ("consolidated.*.pth", f"a Meta checkpoint; convert it, {_CONVERT} {{path}} DIR"),
    ("*.gguf", f"a GGUF file ({{file}}); convert it, {_CONVERT} {{path}}/{{file}} DIR"),
    (
        "model-?????-of-?????.safetensors",
        "shards without their model.safetensors.index.json; download it as well",
    ),
    (
        "*.safetensors",
        "{file} in place of model.safetensors; rename it if that is the complete model",
    ),
    ("flax_model*.msgpack", f"Flax weights ({{file}}); convert them, {_CONVERT} {{path}} DIR"),
    ("streaming_*", f"an EasyLM checkpoint ({{file}}); convert it, {_CONVERT} {{path}} DIR"),
    *(
        (
            f"{folder}{ORBAX_METADATA}",
            f"an Orbax checkpoint of another program; convert it, {_CONVERT} {{path}} DIR (with --map FILE "
            "if the program is not MaxText)",
        )
        for folder in (
            "",
            *(f"{step}{name}/" for step in ("", "*/", "checkpoints/*/") for name in ORBAX_TREES),
        )
    ),
    ("tf_model*.h5", "TensorFlow weights ({file}); load and save them with transformers 4"),
    ("*.onnx", "an ONNX model ({file}); get the checkpoint it was made from"),
    ("weights.npz", "MLX weights ({file}); get the checkpoint they were made from"),
    ("zero_to_fp32.py", "a DeepSpeed checkpoint; run its zero_to_fp32.py first"),
    (
        "pytorch_model_fsdp_*",
        f"a sharded FSDP checkpoint; convert it, {_CONVERT} {{path}}/{{file}} DIR",
    ),
    (
        ".metadata",
        f"a torch distributed checkpoint; convert it, {_CONVERT} {{path}} DIR",
    ),
    (
        "*.distcp",
        "a torch distributed checkpoint without its .metadata, which is written last: saving was cut short",
    ),
    ("*.ckpt", "a Lightning checkpoint ({file}); save its model with save_pretrained first"),
    ("lit_model.pth", f"a LitGPT checkpoint; convert it, {_CONVERT} {{path}} DIR"),
    *(
        (
            pattern,
            "a file of another program ({file}); if it has a Llama's tensors, put its config.json beside "
            f"it and convert it, {_CONVERT} {{path}}/{{file}} DIR",
        )
        for pattern in ("*model*.pt*", "ckpt*.pt")
    ),
)


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins like this is a Git LFS pointer, as in a clone without LFS."""
    return start.startswith(b"version https://git-lfs.github.com/")


POINTER = "a Git LFS pointer, not the file itself; run `git lfs pull` there, or download it again"


def describe(path: Path) -> str:
    """What `path` is instead of a Hugging Face or Orbax checkpoint, and what to do about it.

    Never raises; an unknown directory is "a directory without weights".
    """
    try:
        return _describe(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _describe(path: Path) -> str:
    if not path.exists():
        return "no such directory"
    if not path.is_dir():
        if path.suffix == ".safetensors":
            return "a file; give the directory that it is in"
        return f"a file; for a GGUF file, {_CONVERT} {path} DIR"
    if (path / ADAPTER_CONFIG).exists() or any(path.glob("adapter_model.*")):
        return _adapter(path)
    if (path / "snapshots").is_dir():
        snapshots = sorted(entry for entry in (path / "snapshots").iterdir() if entry.is_dir())
        ref = path / "refs" / "main"
        if ref.is_file():
            name = ref.read_text("utf-8", errors="replace").strip()
            snapshots = [entry for entry in snapshots if entry.name == name] or snapshots
        if snapshots:
            return f"a cache folder of huggingface_hub; give its snapshot: {snapshots[-1]}"
        return "a cache folder of huggingface_hub without a snapshot; download the model again"
    names = sorted(entry.name for entry in path.iterdir())
    if {"model.safetensors", "model.safetensors.index.json"} & set(names):
        return "weights without the config.json that goes with them"
    if (path / "config.json").is_file() and (path / "params").is_dir():
        return (
            "an Orbax directory; load it with llama_jax.load.load_model, or convert it, "
            f"{_CONVERT} {path} DIR"
        )
    for pattern, kind in _KINDS:
        if files := sorted(path.glob(pattern)):
            return kind.format(file=files[0].name, path=path)
    checkpoints = [name for name in names if _is_checkpoint(path / name)]
    if checkpoints:
        # the newest of a trainer's checkpoint-500, checkpoint-1000, ...
        newest = max(checkpoints, key=lambda name: (len(name), name))
        one_of = "it" if len(checkpoints) == 1 else f"one of the {len(checkpoints)}"
        return f"a folder of checkpoints, not one itself; give {one_of}: {path / newest}"
    if models := [name for name in names if name.startswith("models--")]:
        return (
            f"a cache of huggingface_hub; give a snapshot in it: {path / models[0]}/snapshots/..."
        )
    return "a directory without weights" if names else "an empty directory"


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and ((path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file())


def _adapter(path: Path) -> str:
    base = None
    try:
        fields = json.loads((path / ADAPTER_CONFIG).read_bytes())
        base = fields.get("base_model_name_or_path") if isinstance(fields, dict) else None
    except (OSError, ValueError, RecursionError):
        pass
    of = f" for {base}" if isinstance(base, str) and base else ""
    return (
        f"a PEFT adapter{of}, not a complete model; load the model with adapter={str(path)!r}, or merge "
        f"the two, {_CONVERT} MODEL NEW_DIR --adapter {path}"
    )


# quantization methods that transformers can undo, and how
_DEQUANTIZE = {"higgs": "from_pretrained(DIR).dequantize()"}
_READABLE = (
    "MLX",
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "gptq",
    "modelopt",
    "mxfp4",
    "torchao",
)
# the field that says which of a method's kinds it is
_KINDS_OF_METHODS = {
    "MLX": "mode",
    "bitsandbytes": "bnb_4bit_quant_type",
    "compressed-tensors": "format",
}
_BITS = ("bits", "w_bit", "nbits", "num_bits", "weight_bits", "wbits")
# fields of config.json that say how the weights are quantized, as three kinds of programs call it
_FIELDS = ("quantization_config", "compression_config", "quantization")


class ForeignQuantization(NamedTuple):
    """What config.json says of weights that another program quantized.

    Attributes:
        key: the field of config.json.
        fields: its content.
        method: the name of the method, "MLX" for MLX's.
        title: for people.
    """

    key: str
    fields: Mapping[str, Any]
    method: str
    title: str


def foreign_quantization(fields: Mapping[str, Any]) -> ForeignQuantization | None:
    """What a parsed config.json says of quantized weights; None if it says nothing.

    Raises:
        ValueError: a `quantization_config` that is no object.
    """
    for key in _FIELDS:
        config = fields.get(key)
        if config is None or (key == "quantization" and not is_mlx(config)):
            continue
        if not isinstance(config, Mapping):
            raise ValueError(f"{key}: found {_short(config)}, expected an object or null")
        method = str(_method(config))
        bits = _bits(config)
        kind = None if config.get("load_in_8bit") else config.get(_KINDS_OF_METHODS.get(method, ""))
        shown = f" ({_short(kind, quoted=False)})" if isinstance(kind, str) else ""
        title = f"{_short(method, quoted=False)}{shown}" + (f", {bits} bits" if bits else "")
        return ForeignQuantization(key, config, method, title)
    return None


def without_quantization(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json without what it says of quantized weights that can be read.

    Raises:
        ValueError: weights that cannot.
    """
    refusal = quantization_refusal(fields)
    if refusal is not None:
        raise ValueError(refusal)
    if foreign_quantization(fields) is None:
        return dict(fields)
    return {name: value for name, value in fields.items() if name not in _FIELDS}


def quantization_refusal(fields: Mapping[str, Any]) -> str | None:
    """The error for a config.json of weights that another program quantized and that cannot be read."""
    try:
        quantization = foreign_quantization(fields)
    except ValueError as error:
        return str(error)
    if quantization is None or quantization.method in _READABLE:
        return None
    remedy = "use the original, unquantized checkpoint"
    if quantization.method in _DEQUANTIZE:
        remedy += (
            f", or dequantize it with transformers: AutoModelForCausalLM."
            f"{_DEQUANTIZE[quantization.method]}, then save_pretrained(NEW_DIR)"
        )
    return (
        f"{quantization.key}: the weights are quantized ({quantization.title}), which is not supported; "
        f"{remedy}"
    )


def is_mlx(config: Any) -> bool:
    """Whether a field of config.json is MLX's description of quantized weights."""
    return isinstance(config, Mapping) and "bits" in config


def _method(config: Mapping[str, Any]) -> Any:
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    if config.get("quant_method") is not None:
        return config["quant_method"]
    if "config_groups" in config or "sparsity_config" in config:
        return "compressed-tensors"
    return "MLX" if {"bits", "group_size"} <= config.keys() else "by an unnamed method"


def _bits(config: Mapping[str, Any], depth: int = 3) -> int | None:
    """Bits per weight, wherever the method stores them."""
    for flag, width in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if config.get(flag) is True:
            return width
    for name in _BITS:
        if type(config.get(name)) is int:
            return int(config[name])
    inner = [value for value in config.values() if isinstance(value, Mapping) and depth]
    # compressed-tensors: config_groups.group_0.weights.num_bits; hqq: weight_quant_params.nbits
    inner.sort(key=lambda group: "weights" not in group)
    weights = [group["weights"] for group in inner if isinstance(group.get("weights"), Mapping)]
    widths = (_bits(group, depth - 1) for group in weights + inner)
    return next((width for width in widths if width is not None), None)


def _short(value: Any, quoted: bool = True) -> str:
    text = repr(value) if quoted else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
