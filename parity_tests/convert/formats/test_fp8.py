"""`--dtype fp8`: compressed-tensors with a scale for each row, as the library itself writes it."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import convert
from convert.__main__ import main
from convert.formats.fp8 import quantized
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model
from parity_tests.library.checkpoints.quantized.tiny import FIXTURES, KEYS, write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_layout_is_the_librarys(tmp_path: Path) -> None:
    """Names, dtypes and shapes of a module, and the config, as compressed-tensors' own fixture has them."""
    write(tmp_path / "theirs", "ct_fp8_channel")
    out = convert.convert(tmp_path / "theirs", tmp_path / "out", dtype="fp8")
    with safe_open(FIXTURES / "ct_fp8_channel.safetensors", "pt") as file:
        expected = {key: file.get_tensor(key) for key in file.keys() if key.startswith(KEYS)}  # noqa: SIM118
        theirs = json.loads(file.metadata()["config"])
    ours = {
        key: value
        for key, value in load_file(out / "model.safetensors").items()
        if key.startswith(KEYS)
    }
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in expected.items()
    }
    config = json.loads((out / "config.json").read_text())
    fields = config["quantization_config"]
    group, reference = (each["config_groups"]["group_0"] for each in (fields, theirs))
    for kind in ("weights", "input_activations"):
        known = {name: value for name, value in reference[kind].items() if name in group[kind]}
        assert group[kind] == known
    for name in ("quant_method", "format", "ignore"):
        assert fields[name] == theirs[name]
    assert config["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values(model: Path, tmp_path: Path, dtype: str) -> None:
    source = convert.convert(model, tmp_path / "source", dtype=dtype)
    out = convert.convert(source, tmp_path / "out", dtype="fp8")
    weights, stored = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    again = load_file(convert.convert(out, tmp_path / "again") / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
    for name, values in weights.items():
        if "_proj" not in name:
            torch.testing.assert_close(stored[name], values, rtol=0, atol=0)
            continue
        wide, scale = values.float(), stored[f"{name}_scale"]
        codes = (wide / scale).to(torch.float8_e4m3fn)
        assert torch.equal(stored[name].float(), codes.float())
        assert (codes.float().abs().amax(1) == 448).all()
        dequantized = codes.float() * scale
        assert torch.equal(again[name], dequantized)
        # 3 bits of mantissa: half a step of 1/8
        assert ((dequantized - wide).abs() <= wide.abs() / 16 + scale * 2**-10).all()


def test_quantizing_again_changes_nothing(model: Path, tmp_path: Path) -> None:
    first = convert.convert(model, tmp_path / "first", dtype="fp8")
    second = convert.convert(first, tmp_path / "second", dtype="fp8")
    one, other = (load_file(each / "model.safetensors") for each in (first, second))
    for name, values in one.items():
        assert torch.equal(values.view(torch.uint8), other[name].view(torch.uint8)), name


def test_rows_of_any_magnitude() -> None:
    exponents = np.float32(2.0) ** np.arange(-140, 120, 4)
    values = np.random.default_rng(0).standard_normal((len(exponents), 64)).astype(np.float32)
    values *= exponents[:, None].astype(np.float32)
    values[3] = 0
    codes, scale = quantized(values)
    restored = codes.astype(np.float32) * scale
    again, second = quantized(restored)
    assert np.isfinite(restored).all()
    np.testing.assert_array_equal(again.view(np.uint8) & 0x7F, codes.view(np.uint8) & 0x7F)
    kept = restored.any(axis=1)  # rows too small for any scale become zero
    assert kept.sum() > 50
    np.testing.assert_array_equal(second[kept], scale[kept])
    assert codes.dtype == ml_dtypes.float8_e4m3fn


def test_only_for_hugging_face(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model), str(tmp_path / "out.gguf"), "--dtype", "fp8"]) == 2
    assert "dtype: found 'fp8', expected one of" in capsys.readouterr().err
