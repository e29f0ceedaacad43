"""What holds weights but is no checkpoint that is read here, in words that say what to do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
_CONVERT = "from a checkout of the repository: python -m convert"
# (a pattern of file names, what a directory with one is). The first that matches is told.
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
        "{file} in place of model.safetensors; rename it if that is the whole model",
    ),
    ("flax_model*.msgpack", "Flax weights ({file}); load and save them with transformers 4"),
    ("tf_model*.h5", "TensorFlow weights ({file}); load and save them with transformers 4"),
    ("*.onnx", "an ONNX model ({file}); get the checkpoint it was made from"),
    ("weights.npz", "MLX weights ({file}); get the checkpoint they were made from"),
    ("zero_to_fp32.py", "a DeepSpeed checkpoint; run its zero_to_fp32.py first"),
    (
        "pytorch_model_fsdp_*",
        "a sharded FSDP checkpoint; merge it with `accelerate merge-weights` first",
    ),
    ("*.distcp", "a distributed PyTorch checkpoint; merge it with `accelerate merge-weights`"),
    ("*.ckpt", "a Lightning checkpoint ({file}); save its model with save_pretrained first"),
    ("lit_model.pth", "a LitGPT checkpoint; run `litgpt convert_from_litgpt` first"),
    *(
        (
            pattern,
            "a file of another program ({file}); if it has a Llama's tensors under transformers' names, "
            "rename it pytorch_model.bin, beside their config.json",
        )
        for pattern in ("*model*.pt*", "ckpt*.pt")
    ),
)


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins so is Git LFS's note of a file, which a clone without LFS leaves."""
    return start.startswith(b"version https://git-lfs.github.com/")


POINTER = "Git LFS's pointer, not the file itself; run `git lfs pull` there, or download it again"


def describe(path: Path) -> str:
    """What lies at `path` instead of a Hugging Face or Orbax checkpoint, and what to do about it.

    Never fails: what cannot be recognised is "no checkpoint".
    """
    try:
        return _describe(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _describe(path: Path) -> str:
    if not path.exists():
        if len(path.parts) == 2 and not path.is_absolute():
            return (
                f"no such directory; if it is a name on the Hub: hf download {path} --local-dir DIR"
            )
        return "no such directory"
    if not path.is_dir():
        if path.suffix == ".safetensors":
            return "a file; give the directory that it is in"
        return f"a file; for a GGUF file, {_CONVERT} {path} DIR"
    if (path / ADAPTER_CONFIG).exists() or any(path.glob("adapter_model.*")):
        return _adapter(path)
    if (path / "snapshots").is_dir():
        found = sorted(each for each in (path / "snapshots").iterdir() if each.is_dir())
        ref = path / "refs" / "main"
        if ref.is_file():
            name = ref.read_text("utf-8", errors="replace").strip()
            found = [each for each in found if each.name == name] or found
        if found:
            return f"a cache folder of huggingface_hub; give its snapshot: {found[-1]}"
        return "a cache folder of huggingface_hub without a snapshot; download the model again"
    names = sorted(each.name for each in path.iterdir())
    if {"model.safetensors", "model.safetensors.index.json"} & set(names):
        return "weights without the config.json that goes with them"
    if (path / "config.json").is_file() and (path / "params").is_dir():
        return (
            "an Orbax directory; load it with llama_jax.load.load_model, or convert it, "
            f"{_CONVERT} {path} DIR"
        )
    for pattern, kind in _KINDS:
        if found := sorted(each for each in path.glob(pattern)):
            return kind.format(file=found[0].name, path=path)
    inside = [name for name in names if _looks_like_one(path / name)]
    if inside:
        # of a trainer's checkpoint-500, checkpoint-1000, ... the newest
        last = max(inside, key=lambda name: (len(name), name))
        count = "one" if len(inside) == 1 else f"{len(inside)}, such as"
        return f"a folder of checkpoints, not one itself; give {count}: {path / last}"
    if cached := [name for name in names if name.startswith("models--")]:
        return (
            f"a cache of huggingface_hub; give a snapshot in it: {path / cached[0]}/snapshots/..."
        )
    return "a directory without weights" if names else "an empty directory"


def _looks_like_one(path: Path) -> bool:
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
        f"a PEFT adapter{of}, not a whole model; merge the two with peft: "
        f"AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload()"
        ".save_pretrained(NEW_DIR)"
    )


# methods whose weights transformers turns back into ordinary ones, and how
_DEQUANTIZE = {
    **dict.fromkeys(("bitsandbytes", "higgs"), "from_pretrained(DIR).dequantize()"),
    "fp8": "from_pretrained(DIR, quantization_config=FineGrainedFP8Config(dequantize=True))",
    "mxfp4": "from_pretrained(DIR, quantization_config=Mxfp4Config(dequantize=True))",
    "compressed-tensors": (
        "from_pretrained(DIR, quantization_config=CompressedTensorsConfig(run_compressed=False))"
    ),
}
_BITS = ("bits", "w_bit", "nbits", "num_bits", "weight_bits", "wbits")


def quantization_refusal(fields: Mapping[str, Any]) -> str | None:
    """Why the weights beside a config.json cannot be read, where another program quantised them."""
    found = fields.get("quantization_config")
    if found is None:
        mlx = fields.get("quantization")  # MLX has a field of its own
        if not (isinstance(mlx, Mapping) and "bits" in mlx):
            return None
        found = mlx
    if not isinstance(found, Mapping):
        return f"quantization_config: found {_short(found)}, expected an object or null"
    method = _method(found)
    bits = _bits(found)
    scheme = _short(method, quoted=False) + (f", {bits} bits" if bits is not None else "")
    way = "use the original checkpoint that is not quantised"
    if isinstance(method, str) and method in _DEQUANTIZE:
        how = _DEQUANTIZE[method]
        way += (
            f", or dequantise it with transformers: AutoModelForCausalLM.{how}, then "
            "save_pretrained(NEW_DIR)"
        )
    return (
        f"quantization_config: the weights are quantised ({scheme}), which is not supported; {way}"
    )


def _method(found: Mapping[str, Any]) -> Any:
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    if found.get("quant_method") is not None:
        return found["quant_method"]
    return "MLX" if {"bits", "group_size"} <= found.keys() else "by an unnamed method"


def _bits(found: Mapping[str, Any], depth: int = 3) -> int | None:
    """The bits of a weight, wherever the method keeps them."""
    for flag, width in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if found.get(flag) is True:
            return width
    for name in _BITS:
        if type(found.get(name)) is int:
            return int(found[name])
    inner = [value for value in found.values() if isinstance(value, Mapping) and depth]
    # compressed-tensors: config_groups.group_0.weights.num_bits; hqq: weight_quant_params.nbits
    inner.sort(key=lambda each: "weights" not in each)
    weights = [each["weights"] for each in inner if isinstance(each.get("weights"), Mapping)]
    bits = (_bits(each, depth - 1) for each in weights + inner)
    return next((each for each in bits if each is not None), None)


def _short(value: Any, quoted: bool = True) -> str:
    text = repr(value) if quoted else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
