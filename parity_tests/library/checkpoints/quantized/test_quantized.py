"""Quantized checkpoints of other programs: every weight is bit for bit what its program dequantizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import convert
from convert.__main__ import main
from llama_jax import LlamaForCausalLM, Quantization, dequantize
from llama_jax.checkpoints.huggingface import load_params, to_hf_tensors
from llama_jax.checkpoints.match import abstract_model
from llama_jax.load import load_model
from llama_jax.quantization.model import quantization_of
from parity_tests.library.checkpoints.quantized.tiny import (
    CONFIG,
    KEYS,
    NAMES,
    Fields,
    Tensors,
    digest,
    write,
)

GATE = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_bit_for_bit(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path / "model", name)
    assert expected.keys() == {f"{KEYS}.weight", f"{GATE}.weight"}
    converted = load_file(
        convert.convert(tmp_path / "model", tmp_path / "out") / "model.safetensors"
    )
    assert {str(values.dtype) for values in converted.values()} == {"float32"}
    for weight, reference in expected.items():
        assert digest(converted[weight], reference["dtype"]) == reference["sha256"], weight
    loaded = dict(to_hf_tensors(LlamaForCausalLM.from_pretrained(tmp_path / "model")))
    assert loaded.keys() == converted.keys()
    for weight, values in converted.items():
        np.testing.assert_array_equal(loaded[weight], values, err_msg=weight)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "compression_config", "quantization"} & fields.keys()


def test_there_is_a_fixture_of_every_scheme() -> None:
    kinds = {name.split("_")[0].rstrip("0123456789") for name in NAMES}
    assert kinds == {"awq", "bnb", "ct", "fp", "gptq", "mlx", "mxfp", "torchao"}


@pytest.mark.parametrize("name", ["ct_int4_group", "bnb_nf4_nested", "torchao_int8"])
def test_parts_in_several_files(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path / "model", name, shards=3)
    tensors = dict(to_hf_tensors(load_model(tmp_path / "model")))
    for weight, reference in expected.items():
        assert digest(tensors[weight], reference["dtype"]) == reference["sha256"]


def test_cast_once_to_the_requested_dtype(tmp_path: Path) -> None:
    write(tmp_path / "model", "fp8_block")
    wide = dict(to_hf_tensors(LlamaForCausalLM.from_pretrained(tmp_path / "model")))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
    convert.convert(tmp_path / "model", tmp_path / "out", dtype="bfloat16")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for tensors in map(dict, map(to_hf_tensors, (model, again))):
        for name, values in tensors.items():
            assert values.dtype == jnp.bfloat16
            np.testing.assert_array_equal(values, wide[name].astype(jnp.bfloat16))


def test_loaded_onto_devices(tmp_path: Path) -> None:
    expected = write(tmp_path / "model", "ct_int4_group")
    abstract = abstract_model(LlamaForCausalLM, CONFIG, jnp.float32)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nnx.to_pure_dict(nnx.state(abstract)),
    )
    loaded = load_params(LlamaForCausalLM, tmp_path / "model", params)
    values = np.asarray(loaded["model"]["layers"]["mlp"]["gate_proj"]["weight"][0])
    assert digest(values, "float32") == expected[f"{GATE}.weight"]["sha256"]


def test_info_names_the_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "model", "gptq4_act_order")
    assert main(["info", str(tmp_path / "model")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "gptq, 4 bits" in shown
    info = convert.info(tmp_path / "model")
    assert info["quantization"] == "gptq, 4 bits"
    assert info["stored"]["I32"]["tensors"] == 6
    assert info["default_dtype"] == "float32"
    assert info["notes"] == ["the weights are dequantized (gptq, 4 bits)"]


def test_scales_of_activations_and_cache_are_ignored_and_said(tmp_path: Path) -> None:
    def add(tensors: Tensors, fields: Fields) -> None:
        tensors[f"{KEYS}.input_scale"] = torch.tensor(0.5)
        tensors[f"{GATE}.input_scale"] = torch.tensor(0.5)
        tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.5)

    write(tmp_path / "model", "ct_fp8_tensor", add)
    message = r"input_scale \(2\), k_scale \(1\) ignored: activations and the key/value cache"
    with pytest.warns(UserWarning, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert any("input_scale (2)" in note for note in convert.info(tmp_path / "model")["notes"])


def test_only_the_cache_is_quantized(tmp_path: Path) -> None:
    def change(tensors: Tensors, fields: Fields) -> None:
        _plain(tensors, fields)
        tensors["model.layers.0.self_attn.v_scale"] = torch.tensor(0.5)
        fields["config_groups"] = {}
        fields["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}

    write(tmp_path / "model", "ct_int8_channel", change)
    with pytest.warns(UserWarning, match=r"v_scale \(1\) ignored"):
        LlamaForCausalLM.from_pretrained(tmp_path / "model")


def test_logits_of_a_quantized_source(tmp_path: Path) -> None:
    """PyTorch's model has the dequantized weights."""
    write(tmp_path / "model", "gptq4_v2")
    todo = convert.plan(tmp_path / "model", tmp_path / "out", logits=True)
    assert convert.run(todo).logits is not None


def _scale_of_the_tensor(tensors: Tensors, fields: Fields) -> None:
    """As vLLM's FP8 checkpoints have it."""
    for module in (KEYS, GATE):
        tensors[f"{module}.weight_scale"] = torch.tensor(0.25)
        del tensors[f"{module}.weight_scale_inv"]
    del fields["weight_block_size"]


def _scale_of_rows(tensors: Tensors, fields: Fields) -> None:
    for module in (KEYS, GATE):
        rows = len(tensors[f"{module}.weight"])
        tensors[f"{module}.weight_scale"] = torch.arange(1, rows + 1)[:, None] / 8
        del tensors[f"{module}.weight_scale_inv"]
    fields.clear()
    fields["quant_method"] = "fbgemm_fp8"


def _blocks_that_do_not_divide(tensors: Tensors, fields: Fields) -> None:
    fields["weight_block_size"] = [40, 48]
    for module in (KEYS, GATE):
        rows, columns = tensors[f"{module}.weight"].shape
        grid = -(-rows // 40), -(-columns // 48)
        tensors[f"{module}.weight_scale_inv"] = torch.arange(grid[0] * grid[1]).reshape(grid) + 1.0


@pytest.mark.parametrize(
    "change", [_scale_of_the_tensor, _scale_of_rows, _blocks_that_do_not_divide]
)
def test_other_scales_of_fp8(tmp_path: Path, change: Callable[[Tensors, Fields], None]) -> None:
    stored: Tensors = {}

    def kept(tensors: Tensors, fields: Fields) -> None:
        change(tensors, fields)
        stored.update(tensors)

    write(tmp_path / "model", "fp8_block", kept)
    tensors = dict(to_hf_tensors(LlamaForCausalLM.from_pretrained(tmp_path / "model")))
    for module in (KEYS, GATE):
        codes = stored[f"{module}.weight"].float()
        scale = stored.get(f"{module}.weight_scale", stored.get(f"{module}.weight_scale_inv"))
        assert scale is not None
        if change is _blocks_that_do_not_divide:
            scale = scale.repeat_interleave(40, 0).repeat_interleave(48, 1)
            scale = scale[: codes.shape[0], : codes.shape[1]]
        np.testing.assert_array_equal(tensors[f"{module}.weight"], (codes * scale).numpy())


@pytest.mark.parametrize("name", ["gptq4_act_order", "bnb_nf4", "ct_int8_channel", "fp8_block"])
def test_pytorchs_files(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path / "model", name)
    torch.save(
        load_torch(tmp_path / "model" / "model.safetensors"),
        tmp_path / "model" / "pytorch_model.bin",
    )
    (tmp_path / "model" / "model.safetensors").unlink()
    converted = load_file(
        convert.convert(tmp_path / "model", tmp_path / "out") / "model.safetensors"
    )
    for weight, reference in expected.items():
        assert digest(converted[weight], reference["dtype"]) == reference["sha256"]


def test_biases_of_zeros_that_the_model_has_not(tmp_path: Path) -> None:
    """AutoGPTQ stores them."""

    def add(tensors: Tensors, fields: Fields) -> None:
        tensors[f"{KEYS}.bias"] = torch.zeros(32)

    write(tmp_path / "model", "gptq2", add)
    assert any(
        "1 biases that are zero" in note for note in convert.info(tmp_path / "model")["notes"]
    )

    def other(tensors: Tensors, fields: Fields) -> None:
        tensors[f"{KEYS}.bias"] = torch.ones(32)

    write(tmp_path / "model", "gptq2", other)
    assert f"{KEYS}.bias: unexpected" in convert.info(tmp_path / "model")["problems"][0]


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_modelopt(tmp_path: Path, file: str) -> None:
    stored: Tensors = {}

    def change(tensors: Tensors, fields: Fields) -> None:
        for module in (KEYS, GATE):
            tensors[f"{module}.weight"] = tensors.pop(f"{module}.weight_packed")
            del tensors[f"{module}.weight_global_scale"]
            tensors[f"{module}.weight_scale_2"] = torch.tensor(0.003)
        stored.update(tensors)
        fields.clear()
        fields.update(quant_method="modelopt", quant_algo="NVFP4")

    write(tmp_path / "model", "ct_nvfp4", change)
    if file != "config.json":
        path = tmp_path / "model" / "config.json"
        fields = json.loads(path.read_text())
        del fields["quantization_config"]
        path.write_text(json.dumps(fields))
        quantization = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
        (tmp_path / "model" / file).write_text(json.dumps(quantization))
    tensors = dict(to_hf_tensors(LlamaForCausalLM.from_pretrained(tmp_path / "model")))
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for module in (KEYS, GATE):
        packed = stored[f"{module}.weight"].int()
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        values = table[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
        scale = stored[f"{module}.weight_scale"].float() * torch.tensor(0.003)
        expected = values * scale.repeat_interleave(16, 1)
        np.testing.assert_array_equal(tensors[f"{module}.weight"], expected.numpy())


@pytest.mark.parametrize(
    ("name", "file", "keys"),
    [
        ("gptq4_v2", "quantize_config.json", {}),
        ("gptq8_act_order", "quantize_config.json", {}),
        ("awq", "quant_config.json", {"bits": "w_bit", "group_size": "q_group_size"}),
        ("awq", "quantize_config.json", {"quant_method": "quant_method"}),
    ],
)
def test_a_file_beside_config_json(
    tmp_path: Path, name: str, file: str, keys: dict[str, str]
) -> None:
    """As AutoGPTQ and AutoAWQ wrote them before transformers knew either."""
    expected = write(tmp_path, name)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    own = fields.pop("quantization_config")
    if "quant_method" not in keys:
        del own["quant_method"]
    path.write_text(json.dumps(fields))
    (tmp_path / file).write_text(json.dumps({keys.get(k, k): v for k, v in own.items()}))
    tensors = dict(to_hf_tensors(LlamaForCausalLM.from_pretrained(tmp_path)))
    for weight, reference in expected.items():
        assert digest(tensors[weight], reference["dtype"]) == reference["sha256"]
    (tmp_path / file).write_text('{"bits": 5, "quant_method": "gptq"}')
    with pytest.raises(ValueError, match=f"{file}: the weights are .* bits: found 5"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_file_beside_weights_that_are_not_quantized(tmp_path: Path) -> None:
    write(tmp_path, "awq", _plain)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    (tmp_path / "quant_config.json").write_text(json.dumps(fields.pop("quantization_config")))
    path.write_text(json.dumps(fields))
    assert "quantization" not in convert.info(tmp_path)


def test_the_groups_of_other_classes(tmp_path: Path) -> None:
    """A group for embeddings, or for attention's cache, is not one for linear layers with their own."""

    def change(tensors: Tensors, fields: Fields) -> None:
        (own,) = fields["config_groups"].values()
        others = [
            {"targets": [name], "weights": own["weights"] | {"group_size": 16}}
            for name in ("Embedding", "LlamaAttention")
        ]
        fields["config_groups"] = dict(zip("abc", [*others, own], strict=True))

    expected = write(tmp_path, "ct_int4_group", change)
    tensors = dict(to_hf_tensors(LlamaForCausalLM.from_pretrained(tmp_path)))
    for weight, reference in expected.items():
        assert digest(tensors[weight], reference["dtype"]) == reference["sha256"]


def test_a_block_as_a_text(tmp_path: Path) -> None:
    """compressed-tensors takes "24x48" for [24, 48], as its older versions wrote it."""

    def change(tensors: Tensors, fields: Fields) -> None:
        weights = fields["config_groups"]["group_0"]["weights"]
        weights["block_structure"] = "x".join(map(str, weights["block_structure"]))

    expected = write(tmp_path, "ct_fp8_block", change)
    tensors = dict(to_hf_tensors(LlamaForCausalLM.from_pretrained(tmp_path)))
    for weight, reference in expected.items():
        assert digest(tensors[weight], reference["dtype"]) == reference["sha256"]


def _quantize_all(fixture: str) -> Callable[[Tensors, Fields], None]:
    """Every projection with the parts of k_proj's fixture, repeated to its shape: a complete model."""

    def change(tensors: Tensors, fields: Fields) -> None:
        for name in [
            name
            for name in tensors
            if name.endswith("_proj.weight") and tensors[name].is_floating_point()
        ]:
            rows, columns = tensors.pop(name).shape
            across, module = -(-columns // 64), name.removesuffix(".weight")
            for part in ("weight_packed", "weight_scale", "weight"):
                stored = tensors.get(f"{KEYS}.{part}")
                if stored is None:
                    continue
                repeats = (-(-rows // 32), 1 if stored.shape[1] == 1 else across)
                width = stored.shape[1] if stored.shape[1] == 1 else stored.shape[1] * columns // 64
                tensors[f"{module}.{part}"] = stored.repeat(repeats)[:rows, :width].contiguous()
            if f"{KEYS}.weight_shape" in tensors:
                tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])

    return change


@pytest.mark.parametrize(
    "name", ["ct_int4_group", "ct_int4_bf16", "ct_int8_packed", "ct_int8_channel"]
)
def test_codes_and_scales_are_kept(tmp_path: Path, name: str) -> None:
    write(tmp_path / "model", name, _quantize_all(name))
    dequantized = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    kept = LlamaForCausalLM.from_pretrained(tmp_path / "model", dequantize=False)
    quantization = quantization_of(kept)
    assert quantization is not None
    assert not quantization.vocabulary
    kept.save_pretrained(tmp_path / "ours")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert quantization_of(ours) == quantization
    expected = dict(to_hf_tensors(dequantized))
    for model in (kept, ours):
        for weight, values in to_hf_tensors(dequantize(model)):
            np.testing.assert_array_equal(
                values, expected[weight].astype(values.dtype), err_msg=weight
            )
    # and back: the same bytes
    if "int8_channel" not in name:  # which is not packed
        kept.save_pretrained(tmp_path / "again", compressed_tensors=True)
        stored = load_torch(tmp_path / "model" / "model.safetensors")
        again = load_torch(tmp_path / "again" / "model.safetensors")
        for weight, tensor in stored.items():
            if "packed" in weight:
                assert torch.equal(again[weight], tensor)
            elif "scale" in weight:
                assert torch.equal(again[weight].float(), tensor.float())


def test_symmetric_gptq_is_kept(tmp_path: Path) -> None:
    def symmetric(tensors: Tensors, fields: Fields) -> None:
        for name in [name for name in tensors if name.endswith("qzeros")]:
            tensors[name].fill_(0x77777777)  # 8, less 1
            tensors[name.replace("qzeros", "g_idx")] = (torch.arange(64) // 32).int()
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors.pop(name).shape
            for part, multiple in (("qweight", 8), ("qzeros", 32), ("scales", 32)):
                stored = tensors[f"{KEYS}.{part}"]
                wide = stored.repeat(-(-columns // 64), -(-rows // 32))
                width = rows // 8 if part == "qzeros" else rows
                tensors[name.replace("weight", part)] = wide[
                    : columns // multiple, :width
                ].contiguous()

    write(tmp_path / "model", "gptq4_act_order", symmetric)
    kept = LlamaForCausalLM.from_pretrained(tmp_path / "model", dequantize=False)
    assert quantization_of(kept) == Quantization(4, 32, False)
    expected = dict(to_hf_tensors(LlamaForCausalLM.from_pretrained(tmp_path / "model")))
    for weight, values in to_hf_tensors(dequantize(kept)):
        np.testing.assert_array_equal(values, expected[weight], err_msg=weight)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("awq", None, "its codes cannot be kept: only symmetric ones"),
        ("ct_fp8_channel", None, "its codes cannot be kept"),
        ("ct_int4_asymmetric", None, "its codes cannot be kept"),
        ("gptq4_v2", None, "missing"),
    ],
)
def test_codes_that_cannot_be_kept(
    tmp_path: Path, name: str, change: Callable[[Tensors, Fields], None] | None, message: str
) -> None:
    write(tmp_path / "model", name, change)
    with pytest.raises(ValueError) as error:
        LlamaForCausalLM.from_pretrained(tmp_path / "model", dequantize=False)
    assert message in str(error.value)
    assert str(tmp_path / "model") in str(error.value)


def _without(part: str) -> Callable[[Tensors, Fields], None]:
    return lambda tensors, fields: tensors.pop(f"{KEYS}.{part}")


def _cut(part: str) -> Callable[[Tensors, Fields], None]:
    def change(tensors: Tensors, fields: Fields) -> None:
        tensors[f"{KEYS}.{part}"] = tensors[f"{KEYS}.{part}"][:-1].contiguous()

    return change


def _as_dtype(part: str, dtype: torch.dtype) -> Callable[[Tensors, Fields], None]:
    def change(tensors: Tensors, fields: Fields) -> None:
        tensors[f"{KEYS}.{part}"] = tensors[f"{KEYS}.{part}"].to(dtype)

    return change


def _says(**settings: object) -> Callable[[Tensors, Fields], None]:
    return lambda tensors, fields: fields.update(settings)


def _group(name: str, value: object) -> Callable[[Tensors, Fields], None]:
    def change(tensors: Tensors, fields: Fields) -> None:
        fields["config_groups"]["group_0"]["weights"][name] = value

    return change


def _targets(tensors: Tensors, fields: Fields) -> None:
    fields["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]


def _fill(part: str, value: float) -> Callable[[Tensors, Fields], None]:
    return lambda tensors, fields: tensors[f"{KEYS}.{part}"].fill_(value)


def _state(tensors: Tensors, fields: Fields) -> None:
    tensors[f"{KEYS}.weight.quant_state.bitsandbytes__nf4"].fill_(65)


def _plain(tensors: Tensors, fields: Fields) -> None:
    for name in [name for name in tensors if name.startswith((KEYS, GATE))]:
        del tensors[name]
    tensors[f"{KEYS}.weight"] = torch.zeros(32, 64)
    tensors[f"{GATE}.weight"] = torch.zeros(96, 64)


FAULTS = [
    ("fp8_block", _without("weight_scale_inv"), "k_proj.weight_scale: missing"),
    ("fp8_block", _without("weight"), "k_proj.weight: missing"),
    (
        "fp8_block",
        _cut("weight_scale_inv"),
        "k_proj.weight_scale_inv: found shape [1, 2], expected",
    ),
    ("fp8_block", _says(weight_block_size=[16]), "weight_block_size: found [16], expected two"),
    ("fp8_block", _as_dtype("weight", torch.int8), "k_proj.weight: found dtype I8"),
    ("fp8_block", _fill("weight_scale_inv", float("inf")), "k_proj.weight"),
    ("ct_int4_group", _without("weight_scale"), "k_proj.weight_scale: missing"),
    ("ct_int4_group", _without("weight_shape"), "k_proj.weight_shape: missing"),
    ("ct_int4_group", _without("weight_packed"), "k_proj.weight: missing"),
    ("ct_int4_group", _group("group_size", 48), "group_size: found 48, which does not divide 64"),
    ("ct_int4_group", _group("num_bits", 9), "num_bits: found 9, expected 1 to 8"),
    ("ct_int4_group", _group("num_bits", 5), "k_proj.weight_packed: found shape [32, 8]"),
    ("ct_int4_group", _group("strategy", "magic"), "strategy: found 'magic', expected one of"),
    ("ct_int4_group", _targets, "k_proj.weight: is quantized, but no group of config_groups"),
    ("ct_int4_group", _says(format="marlin-24"), "format: found 'marlin-24', expected one of"),
    (
        "ct_int4_group",
        _says(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config: found format 'sparse-24-bitmask'",
    ),
    ("ct_int4_asymmetric", _without("weight_zero_point"), "k_proj.weight_zero_point: missing"),
    ("ct_int4_asymmetric", _cut("weight_zero_point"), "k_proj.weight_zero_point: found shape"),
    ("ct_old_g_idx", _fill("weight_g_idx", 9), "weight_g_idx: found groups from 9 to 9"),
    ("ct_int8_channel", _as_dtype("weight", torch.float32), "found dtype F32 beside weight_scale"),
    ("ct_nvfp4", _without("weight_global_scale"), "k_proj.weight_global_scale: missing"),
    ("gptq4_v2", _without("scales"), "k_proj.scales: missing"),
    ("gptq4_v2", _without("qzeros"), "k_proj.qzeros: missing"),
    ("gptq4_v2", _says(bits=5), "bits: found 5, expected one of 2, 3, 4, 8"),
    ("gptq4_v2", _says(bits=8), "k_proj.qzeros: found shape [2, 4], expected [2, 8]"),
    ("gptq4_v2", _says(group_size=48), "group_size: found 48, which does not divide 64"),
    ("gptq4_v2", _says(group_size=0), "group_size: found 0, expected a positive number or -1"),
    ("gptq4_v2", _says(checkpoint_format="marlin"), "checkpoint_format: found 'marlin'"),
    ("gptq4_act_order", _fill("g_idx", -1), "g_idx: found groups from -1 to -1, expected 0 to 1"),
    ("awq", _without("qweight"), "k_proj.qweight: missing"),
    ("awq", _says(version="gemv"), "version: found 'gemv', expected 'gemm'"),
    ("awq", _says(bits=8), "quantization_config: the weights are quantized (awq, 8 bits)"),
    ("awq", _cut("scales"), "k_proj"),
    ("bnb_nf4", _without("weight.absmax"), "k_proj.weight.absmax: missing"),
    ("bnb_nf4", _state, "not the JSON of bitsandbytes' quant_state"),
    ("bnb_nf4", _cut("weight"), "k_proj.weight: found 1023 bytes, expected 1024"),
    ("bnb_nf4_nested", _without("weight.nested_absmax"), "k_proj.weight.nested_absmax: missing"),
    ("bnb_int8", _without("SCB"), "k_proj.SCB: missing"),
    ("mlx_4", _without("biases"), "k_proj.biases: missing"),
    ("mlx_4", _without("scales"), "k_proj.scales: missing"),
    ("mlx_4", _says(bits=7), "bits: found 7, expected one of 2, 3, 4, 5, 6, 8"),
    ("mlx_4", _says(group_size=48), "group_size: found 48, which does not divide 64"),
    ("mlx_4", _says(mode="other"), "mode: found 'other', expected one of affine"),
    ("torchao_int8", _without("_weight_scale"), "k_proj._weight_scale: missing"),
    ("mxfp4", _without("weight_scales"), "k_proj.weight_scales: missing"),
    (
        "fp8_block",
        _says(quant_method="hqq"),
        "the weights are quantized (hqq), which is not supported",
    ),
    ("awq", _plain, "no weight is quantized, although config.json says awq, 4 bits"),
]


@pytest.mark.parametrize(("name", "change", "message"), FAULTS, ids=[m for _, _, m in FAULTS])
def test_faults_are_one_line(
    tmp_path: Path,
    name: str,
    change: Callable[[Tensors, Fields], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "model", name, change)
    with pytest.raises(ValueError) as error:
        LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert message in str(error.value)
    assert str(tmp_path / "model") in str(error.value)
    assert main([str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in " ".join(lines)
    assert lines[-1].startswith("error: ") or len(lines) == 1
    assert not (tmp_path / "out").exists()
