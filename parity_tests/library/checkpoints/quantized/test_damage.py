"""Damaged quantized checkpoints, and the memory that a conversion takes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import convert
from parity_tests.convert.test_damage import flip, truncate
from parity_tests.harness.child_process import ROOT
from parity_tests.library.checkpoints.quantized.tiny import write

SCHEMES = ["awq", "bnb_nf4_nested", "ct_int4_asymmetric", "fp8_block", "gptq4_act_order", "mlx_4"]
SCHEMES += ["torchao_int8"]


def _damaged(
    tmp_path: Path, name: str, damage: Callable[[Path, random.Random], str], cases: int
) -> None:
    """Damage is an error of one line, or numbers that no checksum protects."""
    write(tmp_path / "model", name)
    sound = load_file(convert.convert(tmp_path / "model", tmp_path / "sound") / "model.safetensors")
    rng, errors = random.Random(f"{name} {damage.__name__}"), 0
    for case in range(cases):
        source, out = tmp_path / f"{case}", tmp_path / f"{case} out"
        shutil.copytree(tmp_path / "model", source)
        what = damage(rng.choice(sorted(source.iterdir())), rng)
        try:
            convert.convert(source, out)
        except ValueError as error:
            errors += 1
            assert not out.exists(), what
            assert str(source) in str(error), what
            assert "\n" not in str(error).split(" problems")[0], what
        else:
            tensors = load_file(out / "model.safetensors")
            assert {n: v.shape for n, v in tensors.items()} == {
                n: v.shape for n, v in sound.items()
            }, what
            assert all(np.isfinite(values).all() for values in tensors.values()), what
        shutil.rmtree(source)
    if damage is truncate:
        assert errors == cases
    else:
        assert errors


@pytest.mark.parametrize("damage", [truncate, flip])
@pytest.mark.parametrize("name", SCHEMES)
def test_some_damage(
    tmp_path: Path, name: str, damage: Callable[[Path, random.Random], str]
) -> None:
    _damaged(tmp_path, name, damage, 8)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip])
@pytest.mark.parametrize("name", SCHEMES)
def test_much_damage(
    tmp_path: Path, name: str, damage: Callable[[Path, random.Random], str]
) -> None:
    _damaged(tmp_path, name, damage, 100)


_MEASURED = r"""
import re, sys
import convert
convert.convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["fp8_block", "gptq4_act_order", "bnb_nf4_nested", "ct_int4_group"]
)
def test_memory_is_three_of_the_largest_tensor(tmp_path: Path, name: str, dtype: str) -> None:
    """Peak RSS <= 600 MB + 3 x the largest tensor, which is a quantized head."""
    write(tmp_path / "model", name)
    rows, columns = 1 << 20, 64  # 256 MB in float32
    blocks = rows * columns // 64
    state = {
        "shape": [rows, columns],
        "blocksize": 64,
        "nested_blocksize": 256,
        "nested_offset": 0.5,
    }
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    head = {
        "fp8_block": {
            "weight": torch.zeros(rows, columns).to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.ones(rows // 16, 2),
        },
        "gptq4_act_order": {
            "qweight": torch.ones(columns // 8, rows, dtype=torch.int32),
            "qzeros": torch.ones(2, rows // 8, dtype=torch.int32),
            "scales": torch.ones(2, rows).half(),
            "g_idx": torch.arange(columns, dtype=torch.int32) % 2,
        },
        "bnb_nf4_nested": {
            "weight": torch.ones(rows * columns // 2, 1, dtype=torch.uint8),
            "weight.absmax": torch.ones(blocks, dtype=torch.uint8),
            "weight.nested_absmax": torch.ones(blocks // 256),
            "weight.nested_quant_map": torch.ones(256),
            "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": text,
        },
        "ct_int4_group": {
            "weight_packed": torch.ones(rows, columns // 8, dtype=torch.int32),
            "weight_scale": torch.ones(rows, 2),
            "weight_shape": torch.tensor([rows, columns]),
        },
    }[name]
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_torch(file)
    del tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"] = torch.zeros(rows, columns).half()
    save_torch(tensors | {f"lm_head.{part}": values for part, values in head.items()}, file)
    fields = json.loads((file.parent / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps(fields | {"vocab_size": rows}))
    command = [sys.executable, "-c", _MEASURED, str(file.parent), str(tmp_path / "out"), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 <= 600e6 + 3 * rows * columns * 4
