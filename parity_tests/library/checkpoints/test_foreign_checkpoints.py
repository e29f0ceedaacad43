"""Directories written by other programs: read if unambiguous, else an error that says what to do."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import nnx

from convert import convert, info
from convert.__main__ import main as convert_main
from llama_jax import LlamaConfig, LlamaForCausalLM, load
from llama_jax.checkpoints import huggingface
from llama_jax.checkpoints.safetensors_write import SINGLE_FILE
from llama_jax.files.foreign_weights import describe, foreign_quantization
from llama_jax.quantization.model import quantize

CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)
TIED = LlamaConfig.from_dict(CONFIG.to_dict() | {"tie_word_embeddings": True})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A directory of each config, by whether it is tied."""
    home = tmp_path_factory.mktemp("saved")
    for config in (CONFIG, TIED):
        LlamaForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(
            home / str(config.tie_word_embeddings)
        )
    return {tied: home / str(tied) for tied in (False, True)}


def copied(source: Path, target: Path, **tensors: Any) -> Path:
    """The directory with other tensors, all of them or (by name) some."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    every = safetensors.numpy.load_file(source / SINGLE_FILE) | tensors
    safetensors.numpy.save_file(every, target / SINGLE_FILE)
    return target


def load_params(directory: Path) -> Any:
    """As `train eval` and `--model.init-from` load."""
    config = LlamaConfig.from_pretrained(directory)
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nnx.to_pure_dict(nnx.state(model)),
    )
    return huggingface.load_params(LlamaForCausalLM, directory, params)


LOADERS = {
    "from_pretrained": LlamaForCausalLM.from_pretrained,
    "load_params": load_params,
    "load_model": load.load_model,
    "convert": lambda directory: convert(
        directory, directory.with_name(f"{directory.name}-converted")
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_checks_a_stored_copy_of_a_tied_head(saved, tmp_path, loader):
    embedding = safetensors.numpy.load_file(saved[True] / SINGLE_FILE)["model.embed_tokens.weight"]
    same = copied(saved[True], tmp_path / "same", **{"lm_head.weight": embedding.copy()})
    LOADERS[loader](same)
    other = embedding.copy()
    other[-1, -1] += 1
    # another shape and another dtype are another head as well
    for number, head in enumerate((other, embedding[:-1].copy(), other.astype(np.float16))):
        directory = copied(saved[True], tmp_path / str(number), **{"lm_head.weight": head})
        with pytest.raises(
            ValueError, match=r"lm_head.weight: differs from the embedding"
        ) as error:
            LOADERS[loader](directory)
        assert "set tie_word_embeddings to false in config.json" in str(error.value)


def test_an_orbax_directory_is_checked_in_the_same_way(saved, tmp_path):
    convert(saved[False], tmp_path / "o", to="orbax")
    fields = json.loads((tmp_path / "o" / "config.json").read_text())
    (tmp_path / "o" / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    (tmp_path / "o" / "conversion.json").unlink()
    for loader in ("load_model", "convert"):
        with pytest.raises(ValueError, match=r"lm_head\.weight: differs from the embedding"):
            LOADERS[loader](tmp_path / "o")


WRAPPERS = ["_orig_mod.", "module.", "module._orig_mod.", "model.", "base_model.model."]


@pytest.mark.parametrize("loader", ["from_pretrained", "load_params", "convert"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_common_prefix_is_removed(saved, tmp_path, wrapper, loader):
    before = safetensors.numpy.load_file(saved[False] / SINGLE_FILE)
    (tmp_path / "w").mkdir()
    (tmp_path / "w/config.json").write_bytes((saved[False] / "config.json").read_bytes())
    named = {wrapper + name: values for name, values in before.items()}
    safetensors.numpy.save_file(named, tmp_path / "w" / SINGLE_FILE)
    loaded = LOADERS[loader](tmp_path / "w")
    if loader == "convert":
        assert any(wrapper.split(".")[0] in note for note in info(tmp_path / "w")["notes"])
        after = safetensors.numpy.load_file(loaded / SINGLE_FILE)
        assert after.keys() == before.keys()
    else:
        params = nnx.to_pure_dict(nnx.state(loaded)) if loader == "from_pretrained" else loaded
        weight = params["model"]["embed_tokens"]["weight"]
        np.testing.assert_array_equal(weight, before["model.embed_tokens.weight"])


def test_wrappers_inside_names(saved, tmp_path):
    """FSDP and activation checkpointing name the layers that they wrap."""
    before = safetensors.numpy.load_file(saved[True] / SINGLE_FILE)
    wrapped = {
        name.replace(
            "layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."
        ): tensor
        for name, tensor in before.items()
    }
    safetensors.numpy.save_file(wrapped, copied(saved[True], tmp_path / "w") / SINGLE_FILE)
    LlamaForCausalLM.from_pretrained(tmp_path / "w")


def test_a_prefix_of_some_names_is_reported(saved, tmp_path):
    directory = copied(saved[False], tmp_path / "w")
    tensors = safetensors.numpy.load_file(directory / SINGLE_FILE)
    mixed = {
        ("module." if "layers" in name else "") + name: tensor for name, tensor in tensors.items()
    }
    safetensors.numpy.save_file(mixed, directory / SINGLE_FILE)
    with pytest.raises(ValueError, match=r"some names begin with 'module\.' and others do not"):
        LlamaForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_in_separate_files_is_not_ignored_silently(saved, tmp_path, loader):
    """transformers applies it if peft is installed, and otherwise loads the model without it."""
    directory = copied(saved[False], tmp_path / "a")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (directory / "adapter_model.safetensors").write_bytes(b"")
    if loader == "convert":
        assert any("adapter beside the weights is not" in n for n in info(directory)["notes"])
        return
    with pytest.warns(UserWarning, match="adapter beside the weights is not applied; to apply it"):
        LOADERS[loader](directory)


PARTS = [
    # as GPTQ and AWQ, bitsandbytes, compressed-tensors, fp8, NVFP4 and MLX call them
    *("qweight", "qzeros", "g_idx", "scales", "SCB", "weight.absmax", "weight.quant_map"),
    *("weight.quant_state.bitsandbytes__nf4", "weight_packed", "weight_shape", "weight_scale"),
    *("weight_scale_inv", "weight_scale_2"),
]


@pytest.mark.parametrize("part", PARTS)
def test_quantized_weights_that_config_json_does_not_mention(saved, tmp_path, part):
    name = f"model.layers.0.mlp.up_proj.{part}"
    directory = copied(saved[False], tmp_path / "q", **{name: np.zeros(2, np.int32)})
    for loader in ("from_pretrained", "convert"):
        with pytest.raises(ValueError, match=r"quantized by another program \(.*original") as error:
            LOADERS[loader](directory)
        assert name in str(error.value)


def test_git_lfs_pointers(saved, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    for file in ("model.safetensors", "pytorch_model.bin", "m.gguf", "tokenizer.json"):
        directory = tmp_path / file.replace(".", "-")
        if file == "tokenizer.json":
            copied(saved[False], directory)
        else:
            directory.mkdir()
            (directory / "config.json").write_bytes((saved[False] / "config.json").read_bytes())
        (directory / file).write_bytes(pointer)
        source = directory / file if file == "m.gguf" else directory
        with pytest.raises(ValueError, match="run `git lfs pull`") as error:
            convert(source, tmp_path / "out")
        assert "\n" not in str(error.value)


def test_an_adapter_beside_the_weights(saved, tmp_path):
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    directory = copied(saved[False], tmp_path / "a", **{name: np.zeros((2, 16), np.float32)})
    with pytest.raises(ValueError, match="merge_and_unload"):
        LlamaForCausalLM.from_pretrained(directory)


def test_lightnings_state_dict(saved, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = safetensors.numpy.load_file(saved[False] / SINGLE_FILE)
    state = {f"model.{name}": torch.from_numpy(values) for name, values in tensors.items()}
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_bytes((saved[False] / "config.json").read_bytes())
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "b" / "pytorch_model.bin")
    convert(tmp_path / "b", tmp_path / "c")
    after = safetensors.numpy.load_file(tmp_path / "c" / SINGLE_FILE)
    assert after.keys() == tensors.keys()


# (files and directories, what is said)
DIRECTORIES = [
    ({}, "an empty directory"),
    (
        {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
        "PEFT adapter for org/base",
    ),
    ({"adapter_config.json": "[]", "adapter_model.safetensors": ""}, "--adapter"),
    ({"pytorch_model.bin": "", "config.json": "{}"}, "python -m convert"),
    ({"flax_model.msgpack": ""}, "Flax weights"),
    ({"tf_model.h5": ""}, "TensorFlow weights"),
    ({"model.onnx": ""}, "an ONNX model"),
    ({"weights.npz": ""}, "MLX weights"),
    ({"model_index.json": ""}, "diffusers"),
    ({"m-Q4_K.gguf": ""}, "a GGUF file (m-Q4_K.gguf)"),
    ({"model-00001-of-00002.safetensors": ""}, "shards without their model.safetensors.index.json"),
    ({"snapshots/abc/config.json": "", "refs/main": "abc"}, "give its snapshot: {}/snapshots/abc"),
    ({"checkpoint-500/config.json": "", "checkpoint-1000/config.json": ""}, "{}/checkpoint-1000"),
    ({"model/config.json": ""}, "give it: {}/model"),
    ({"models--a--b/snapshots/x/config.json": ""}, "a cache of huggingface_hub"),
    ({"model.safetensors": ""}, "without the config.json"),
    ({"notes.txt": ""}, "a directory without weights"),
    ({"lit_model.pth": "", "model_config.yaml": ""}, "a LitGPT checkpoint; convert it, "),
    ({"ckpt.pt": ""}, "a file of another program (ckpt.pt)"),
    ({"hf_model_0001_0.pt": ""}, "put its config.json beside it and convert it"),
]


@pytest.mark.parametrize(("files", "message"), DIRECTORIES, ids=[m[:24] for _, m in DIRECTORIES])
def test_directories_that_are_not_checkpoints(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    message = message.format(tmp_path)
    assert message in describe(tmp_path)
    if "config.json" not in files:
        with pytest.raises(ValueError) as error:
            load.load_model(tmp_path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


SCHEMES = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
    ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
        },
        "compressed-tensors, 8 bits",
    ),
    ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
    ({"group_size": 64, "bits": 4}, "MLX, 4 bits"),
]
REFUSED = [
    (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
        "hqq, 4",
        "original",
    ),
    ({"quant_method": "higgs", "bits": 4}, "higgs, 4 bits", "dequantize()"),
    ({"quant_method": "quip"}, "quip", "original"),
    ({}, "by an unnamed method", "original"),
]


@pytest.mark.parametrize(("quantization", "title"), SCHEMES, ids=[t for _, t in SCHEMES])
def test_a_config_of_quantized_weights_is_that_of_the_dequantized(quantization, title):
    fields = CONFIG.to_dict() | {"quantization_config": quantization}
    assert foreign_quantization(fields).title == title
    assert LlamaConfig.from_dict(fields) == CONFIG
    with pytest.raises(ValueError, match=f"quantization_config: found {title}, expected none"):
        LlamaConfig(extra_fields={"quantization_config": quantization})


@pytest.mark.parametrize(
    ("quantization", "scheme", "remedy"), REFUSED, ids=[s for _, s, _ in REFUSED]
)
def test_the_quantization_method_and_a_remedy_are_named(tmp_path, quantization, scheme, remedy):
    fields = CONFIG.to_dict() | {"quantization_config": quantization | {"padding": "x" * 5000}}
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_dict(fields)
    assert f"the weights are quantized ({scheme}" in str(error.value)
    assert remedy in str(error.value)
    assert len(str(error.value)) < 400


def test_mlxs_field():
    fields = {"quantization": {"bits": 4, "group_size": 64}}
    assert foreign_quantization(fields).title == "MLX, 4 bits"
    assert foreign_quantization({"quantization": "none"}) is None


def test_info_of_a_quantized_checkpoint_fails(saved, tmp_path, capsys):
    directory = copied(saved[False], tmp_path / "q")
    assert convert_main(["info", str(directory)]) == 0
    fields = CONFIG.to_dict() | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (directory / "config.json").write_text(json.dumps(fields))
    for options in ([], ["--json"]):
        assert convert_main(["info", str(directory), *options]) == 1
        assert "awq, 4 bits" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "cls", [transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM], ids=["auto", "llama"]
)
def test_transformers_refuses_our_quantized_weights(saved, tmp_path, cls):
    """It would initialize weights whose names it does not know."""
    quantize(LlamaForCausalLM.from_pretrained(saved[False]), 8).save_pretrained(tmp_path / "q")
    with pytest.raises(ValueError, match="quant_method"):
        cls.from_pretrained(tmp_path / "q")
    LlamaForCausalLM.from_pretrained(tmp_path / "q")
    # as earlier versions of this library wrote it
    path = tmp_path / "q" / "config.json"
    path.write_text(path.read_text().replace("quantized_by", "quant_method"))
    LlamaForCausalLM.from_pretrained(tmp_path / "q")


def test_saving_over_another_model_removes_its_other_files(saved, tmp_path):
    model = LlamaForCausalLM.from_pretrained(saved[False])
    convert(saved[True], tmp_path / "d")
    for name in ("generation_config.json", "adapter_config.json"):
        (tmp_path / "d" / name).write_text('{"eos_token_id": 7}')
    (tmp_path / "d" / "tokenizer.json").write_text("{}")
    assert (tmp_path / "d" / "conversion.json").exists()
    model.save_pretrained(tmp_path / "d")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert LlamaForCausalLM.from_pretrained(tmp_path / "d").generation_config.eos_token_ids == (2,)


# fields that transformers' Llama does not look at (its logits are the same with and without)
IGNORED = {"sliding_window": 4, "final_logit_softcapping": 30.0, "qk_norm": True}


def test_fields_that_transformers_ignores_cause_a_warning(saved, tmp_path):
    plain = transformers.LlamaForCausalLM.from_pretrained(saved[False])
    directory = copied(saved[False], tmp_path / "f")
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | IGNORED))
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory)
    ids = np.arange(12)[None] % CONFIG.vocab_size
    import torch

    logits = theirs(torch.from_numpy(ids)).logits.detach().numpy()
    np.testing.assert_array_equal(logits, plain(torch.from_numpy(ids)).logits.detach().numpy())
    with pytest.warns(UserWarning, match="sliding_window 4"):
        ours = LlamaForCausalLM.from_pretrained(directory)
    np.testing.assert_allclose(ours(ids).logits, logits, atol=2e-6)
    assert any("qk_norm True" in note for note in info(directory)["notes"])
    written = ours.config.to_dict()
    assert {name: written[name] for name in IGNORED} == IGNORED
