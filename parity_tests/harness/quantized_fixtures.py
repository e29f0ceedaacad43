"""Write the fixtures of quantized weights: stored tensors, and what their program makes of them.

Each is a small safetensors file with the tensors of two projections as they are in a checkpoint. Its
metadata have config.json's field, and the dtype and SHA-256 of each dequantized weight [out, in].

    python parity_tests/harness/quantized_fixtures.py LIBRARY OUT

writes those of one library into OUT, where it is installed: compressed-tensors 0.20.0 (`ct`) or 0.10.2
(`ct_old`), bitsandbytes 0.50.2 (`bnb`), torchao 0.18.0 (`torchao`), mlx 0.32.4 with mlx-cpu (`mlx`),
transformers 5.23.0 (`fp8`), or the unpacked sources of gptqmodel 7.7.0 (`gptq`, with the variable GPTQMODEL
set to their directory).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

SHAPES = {
    "model.layers.0.self_attn.k_proj": (32, 64),
    "model.layers.0.mlp.gate_proj": (96, 64),
}
Tensors = dict[str, torch.Tensor]


def weights(dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def save(
    out: Path,
    name: str,
    config: dict[str, Any],
    stored: Tensors,
    expected: Tensors,
    metadata: dict[str, str] | None = None,
    field: str = "quantization_config",
) -> None:
    digests = {}
    for weight, values in expected.items():
        raw = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(values.dtype).removeprefix("torch.")
        digests[weight] = {"dtype": dtype, "sha256": hashlib.sha256(raw).hexdigest()}
    facts = {"field": field, "config": json.dumps(config), "expected": json.dumps(digests)}
    stored = {key: value.contiguous() for key, value in stored.items()}
    save_file(stored, out / f"{name}.safetensors", {**(metadata or {}), **facts})


def ct(out: Path) -> None:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    def case(
        name: str,
        form: str,
        dtype: torch.dtype = torch.float32,
        activations: bool = False,
        **args: Any,
    ) -> None:
        settings = QuantizationArgs(**args)
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=settings,
            input_activations=QuantizationArgs(
                num_bits=8, type=args["type"], dynamic=True, strategy="token"
            )
            if activations
            else None,
        )
        compressor = BaseCompressor.get_value_from_registry(form)
        stored, expected = {}, {}
        for module, weight in weights(dtype).items():
            state: dict[str, torch.Tensor] = {"weight": weight}
            rows, columns = weight.shape
            if settings.strategy == "block":
                height, width = settings.block_structure
                pad = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
                grouped = pad.unflatten(1, (-1, width)).unflatten(0, (-1, height))
                low, high = grouped.amin((1, 3)), grouped.amax((1, 3))
            elif settings.strategy in ("group", "tensor_group"):
                grouped = weight.unflatten(1, (-1, settings.group_size))
                low, high = grouped.amin(-1), grouped.amax(-1)
            elif settings.strategy == "channel":
                low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            else:
                low, high = weight.amin().reshape(1), weight.amax().reshape(1)
            if settings.strategy == "tensor_group":
                state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
            scale, zero = calculate_qparams(
                low, high, settings, global_scale=state.get("weight_global_scale")
            )
            state["weight_scale"] = scale if form.startswith(("nv", "mx")) else scale.to(dtype)
            state["weight_zero_point"] = zero
            packed = compressor.compress(state, scheme)
            stored |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
            expected[f"{module}.weight"] = compressor.decompress(packed, scheme)["weight"]
        config = {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
            "version": "0.20.0",
        }
        save(out, f"ct_{name}", config, stored, expected)

    bf16, int_, float_ = torch.bfloat16, {"type": "int"}, {"type": "float", "num_bits": 8}
    case("int8_channel", "int-quantized", activations=True, strategy="channel", **int_)
    case("int8_tensor_bf16", "int-quantized", bf16, True, strategy="tensor", **int_)
    case(
        "int8_asymmetric",
        "int-quantized",
        activations=True,
        strategy="channel",
        symmetric=False,
        **int_,
    )
    case("int4_group", "pack-quantized", num_bits=4, strategy="group", group_size=32, **int_)
    case("int4_bf16", "pack-quantized", bf16, num_bits=4, strategy="group", group_size=16, **int_)
    case(
        "int4_asymmetric",
        "pack-quantized",
        num_bits=4,
        strategy="group",
        group_size=32,
        symmetric=False,
        **int_,
    )
    case("int8_packed", "pack-quantized", num_bits=8, strategy="channel", **int_)
    case(
        "int3_dense",
        "pack-quantized",
        num_bits=3,
        strategy="group",
        group_size=32,
        symmetric=False,
        **int_,
    )
    case("int6_channel", "pack-quantized", num_bits=6, strategy="channel", symmetric=False, **int_)
    case("fp8_channel", "float-quantized", activations=True, strategy="channel", **float_)
    case("fp8_channel_bf16", "float-quantized", bf16, True, strategy="channel", **float_)
    case("fp8_tensor", "naive-quantized", strategy="tensor", **float_)
    case(
        "fp8_block",
        "float-quantized",
        activations=True,
        strategy="block",
        block_structure=[24, 48],
        **float_,
    )
    case(
        "nvfp4",
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    case(
        "mxfp4",
        "mxfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype=torch.uint8,
        zp_dtype=torch.uint8,
    )
    case(
        "mxfp8",
        "mxfp8-quantized",
        num_bits=8,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype=torch.uint8,
        zp_dtype=torch.uint8,
    )


def ct_old(out: Path) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    for name, bits, symmetric, ordered in (
        ("g_idx", 4, True, True),
        ("int3", 3, True, False),
    ):
        args = QuantizationArgs(
            num_bits=bits, type="int", strategy="group", group_size=16, symmetric=symmetric
        )
        compressor = PackedQuantizationCompressor()
        stored, expected = {}, {}
        for module, weight in weights().items():
            columns = weight.shape[1]
            order = torch.randperm(columns) if ordered else torch.arange(columns)
            group = torch.empty(columns, dtype=torch.int32)
            group[order] = (torch.arange(columns) // 16).int()
            grouped = weight[:, torch.argsort(group)].unflatten(1, (-1, 16))
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            zeros = {} if symmetric else {"zero_point": zero}
            indices = {"g_idx": group} if ordered else {}
            packed = compressor.compress_weight(
                weight, scale, quantization_args=args, **zeros, **indices
            )
            packed["weight_scale"] = scale
            if ordered:
                packed["weight_g_idx"] = group
            stored |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
            expected[f"{module}.weight"] = compressor.decompress_weight(packed, args)
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["re:.*proj"],
                    "weights": {
                        "num_bits": bits,
                        "type": "int",
                        "strategy": "group",
                        "group_size": 16,
                        "symmetric": symmetric,
                        "actorder": "group" if ordered else None,
                    },
                }
            },
        }
        save(out, f"ct_old_{name}", config, stored, expected, field="compression_config")


def bnb(out: Path) -> None:
    import bitsandbytes.functional as F  # noqa: N812

    for kind, nested, block in (("nf4", False, 64), ("nf4", True, 64), ("fp4", True, 64)):
        stored, expected = {}, {}
        for module, weight in weights().items():
            codes, state = F.quantize_4bit(
                weight, quant_type=kind, compress_statistics=nested, blocksize=block
            )
            stored[f"{module}.weight"] = codes
            for part, tensor in state.as_dict(packed=True).items():
                stored[f"{module}.weight.{part}"] = tensor
            expected[f"{module}.weight"] = F.dequantize_4bit(codes, state)
        config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
        }
        save(out, f"bnb_{kind}{'_nested' if nested else ''}", config, stored, expected)
    stored, expected = {}, {}
    for module, weight in weights().items():
        codes, scb, _ = F.int8_vectorwise_quant(weight.half())
        stored |= {f"{module}.weight": codes, f"{module}.SCB": scb}
        stored[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        expected[f"{module}.weight"] = F.int8_vectorwise_dequant(codes, scb)
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    save(out, "bnb_int8", config, stored, expected)


def mlx(out: Path) -> None:
    import mlx.core as mx

    def tensor(array: Any) -> torch.Tensor:
        if array.dtype == mx.bfloat16:
            return torch.from_numpy(np.array(array.astype(mx.float32))).bfloat16()
        return torch.from_numpy(np.array(array))

    cases = [
        (f"{bits}", {"bits": bits, "group_size": 64 if bits == 4 else 32})
        for bits in (2, 3, 4, 5, 6, 8)
    ]
    cases += [(mode, {"mode": mode}) for mode in ("mxfp4", "mxfp8", "nvfp4")]
    for name, settings in cases:
        stored, expected = {}, {}
        for module, weight in weights().items():
            parts = mx.quantize(mx.array(weight.numpy()), **settings)
            for part, array in zip(("weight", "scales", "biases"), parts, strict=False):
                stored[f"{module}.{part}"] = tensor(array)
            expected[f"{module}.weight"] = tensor(mx.dequantize(*parts, **settings))
        config = {"group_size": 32, "bits": 8 if name == "mxfp8" else 4, **settings}
        if name == "nvfp4":
            config["group_size"] = 16
        save(out, f"mlx_{name}", config, stored, expected, {"format": "mlx"}, "quantization")


def torchao(out: Path) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        quantize_,
    )

    for name, config, dtype in (
        ("int8", Int8WeightOnlyConfig(), torch.float32),
        ("int8_bf16", Int8WeightOnlyConfig(), torch.bfloat16),
        ("intx4", IntxWeightOnlyConfig(torch.int4, PerGroup(32)), torch.float32),
        ("intx6", IntxWeightOnlyConfig(torch.int6, PerAxis(0)), torch.float32),
        ("float8", Float8WeightOnlyConfig(), torch.float32),
    ):
        tensors, expected = {}, {}
        for module, weight in weights(dtype).items():
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            quantize_(linear, config)
            tensors[f"{module}.weight"] = linear.weight.data
            expected[f"{module}.weight"] = linear.weight.dequantize()
        stored, metadata = flatten_tensor_state_dict(tensors)
        fields = {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": type(config).__name__}},
        }
        save(out, f"torchao_{name}", fields, stored, expected, metadata)


def fp8(out: Path) -> None:
    """The dequantizers of transformers: FP8 by blocks, MXFP4 of gpt-oss."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for name, block, scale_dtype in (
        ("block", (16, 32), torch.float32),
        ("block_bf16", (32, 64), torch.bfloat16),
    ):
        stored, expected = {}, {}
        for module, weight in weights().items():
            grouped = weight.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
            scale = (grouped.abs().amax((1, 3)) / 448).to(scale_dtype)
            codes = (grouped / scale.float()[:, None, :, None]).reshape(weight.shape)
            stored[f"{module}.weight"] = codes = codes.clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{module}.weight_scale_inv"] = scale
            expected[f"{module}.weight"] = Fp8Dequantize(None)._dequantize_one(
                codes, scale, torch.float32
            )
        config = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": list(block),
            "modules_to_not_convert": ["lm_head"],
        }
        save(out, f"fp8_{name}", config, stored, expected)
    generator = np.random.default_rng(0)
    stored, expected = {}, {}
    for module, (rows, columns) in SHAPES.items():
        blocks = generator.integers(0, 256, (rows, columns // 32, 16), np.uint8)
        scales = generator.integers(110, 140, (rows, columns // 32), np.uint8)
        stored[f"{module}.weight_blocks"] = torch.from_numpy(blocks)
        stored[f"{module}.weight_scales"] = torch.from_numpy(scales)
        values = convert_moe_packed_tensors(
            torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None], dtype=torch.bfloat16
        )
        expected[f"{module}.weight"] = values[0].T.contiguous()
    save(out, "mxfp4", {"quant_method": "mxfp4"}, stored, expected)


def gptq(out: Path) -> None:
    """Packed by hand, dequantized by GPTQModel's own functions, which are taken out of its sources."""
    sources = Path(os.environ["GPTQMODEL"]) / "gptqmodel"
    path = sources / "quantization" / "awq" / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    assert spec is not None
    assert spec.loader is not None
    awq = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(awq)
    layers = sources / "nn_modules" / "qlinear" / "__init__.py"
    wanted = {
        "dequantize_weight",
        "_dequantize_from_codes",
        "_torch_right_shift",
        "_torch_left_shift",
    }
    functions: dict[str, Any] = {"t": torch, "torch": torch}
    for file in (layers, sources / "utils" / "torch.py", sources / "quantization" / "dtype.py"):
        for node in ast.walk(ast.parse(file.read_text())) if file.exists() else ():
            if isinstance(node, ast.FunctionDef) and node.name in wanted - functions.keys():
                module = ast.Module(
                    [ast.parse("from __future__ import annotations").body[0], node], []
                )
                exec(compile(module, str(file), "exec"), functions)
    functions.setdefault("_torch_right_shift", torch.bitwise_right_shift)
    functions.setdefault("_torch_left_shift", torch.bitwise_left_shift)
    generator = np.random.default_rng(0)

    def packed(codes: np.ndarray, bits: int) -> torch.Tensor:
        """Rows of codes as rows of 32-bit words, bit by bit."""
        rows = (codes[..., None] >> np.arange(bits)) & 1
        raw = np.packbits(rows.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
        return torch.from_numpy(raw.view(np.int32))

    for bits, form, ordered in (
        (2, "gptq", False),
        (3, "gptq", False),
        (4, "gptq", True),
        (4, "gptq_v2", False),
        (8, "gptq", True),
        (3, "gptq_v2", True),
    ):
        stored, expected = {}, {}
        size = 32
        for module, (rows, columns) in SHAPES.items():
            groups = columns // size
            codes = generator.integers(0, 1 << bits, (rows, columns))
            zeros = generator.integers(1, 1 << bits, (groups, rows))
            scales = torch.from_numpy(generator.uniform(0.01, 0.1, (groups, rows))).half()
            group = np.arange(columns) // size
            group = torch.from_numpy(generator.permutation(group) if ordered else group).int()
            qweight = packed(codes, bits).T.contiguous()
            wf = torch.arange(0, 32, bits, dtype=torch.int32)
            if bits == 3:
                wf = torch.tensor(
                    [
                        [*range(0, 31, 3), 31, 0][:12],
                        [0, *range(1, 32, 3)][:12],
                        [0, *range(2, 30, 3), 0, 0][:12],
                    ],
                    dtype=torch.int32,
                )
                wf[0] = torch.tensor([0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0])
                wf[1] = torch.tensor([0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31])
                wf[2] = torch.tensor([0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0])
            layer = SimpleNamespace(
                planar=False,
                bits=bits,
                pack_factor=32 // bits,
                maxq=(1 << bits) - 1,
                qweight=qweight,
                qzeros=packed(zeros, bits),  # as GPTQModel computes with, in form v2
                scales=scales,
                g_idx=group,
                in_features=columns,
                dequant_dtype=torch.int16 if bits == 8 else torch.int8,
                wf_unsqueeze_zero=wf.reshape(1, 3, 12) if bits == 3 else wf[None, None],
                wf_unsqueeze_neg_one=wf.reshape(3, 12, 1) if bits == 3 else wf[:, None],
                _init_wf_unsqueeze_buffers=lambda: None,
            )
            if bits == 3:
                layer.wf_unsqueeze_zero = wf.reshape(1, 1, 3, 12)
                layer.wf_unsqueeze_neg_one = wf.reshape(1, 3, 12, 1)
            layer._dequantize_from_codes = lambda w, z, num_itr=1, layer=layer: functions[
                "_dequantize_from_codes"
            ](layer, w, z, num_itr)
            expected[f"{module}.weight"] = functions["dequantize_weight"](layer).T.contiguous()
            stored |= {
                f"{module}.qweight": qweight,
                f"{module}.qzeros": packed(zeros - (form == "gptq"), bits),
                f"{module}.scales": scales,
                f"{module}.g_idx": group,
            }
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "desc_act": ordered,
            "sym": False,
        }
        name = f"gptq{bits}{'_v2' if form == 'gptq_v2' else ''}{'_act_order' if ordered else ''}"
        save(out, name, {**config, "checkpoint_format": form}, stored, expected)
    stored, expected = {}, {}
    for module, (rows, columns) in SHAPES.items():
        codes = torch.from_numpy(generator.integers(0, 16, (columns, rows))).int()
        zeros = torch.from_numpy(generator.integers(0, 16, (columns // 32, rows))).int()
        scales = torch.from_numpy(generator.uniform(0.01, 0.1, (columns // 32, rows))).half()
        qweight, qzeros = awq.pack_awq(codes, zeros, 4)
        stored |= {
            f"{module}.qweight": qweight,
            f"{module}.qzeros": qzeros,
            f"{module}.scales": scales,
        }
        expected[f"{module}.weight"] = awq.dequantize_gemm(
            qweight, qzeros, scales, 4, 32
        ).T.contiguous()
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    save(out, "awq", config, stored, expected)


if __name__ == "__main__":
    library, out = sys.argv[1:]
    Path(out).mkdir(parents=True, exist_ok=True)
    globals()[library](Path(out))
