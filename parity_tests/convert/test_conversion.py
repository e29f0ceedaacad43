"""Pairs of formats: every tensor bitwise, read by others, planned, atomic, within its memory."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import convert
from convert import record
from convert.casting import Changes, changes
from convert.formats.registry import writable
from llama_jax import LlamaForCausalLM
from llama_jax.checkpoints.safetensors_write import TensorSpec, write_safetensors
from llama_jax.files import page_cache
from parity_tests.convert.formats.gguf.tiny_gguf import same, tiny_model
from parity_tests.harness.child_process import ROOT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
MATRIX = [
    {
        "heads": heads,
        "tied": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "head_dim": head_dim,
        "dtype": list(DTYPES)[(number + number // 3) % 3],
    }
    for number, (tied, attention_bias, mlp_bias, head_dim, heads) in enumerate(
        itertools.product(*[(False, True)] * 3, (8, 16), HEADS)
    )
]
assert len({tuple(each.values()) for each in MATRIX}) == 48


def model_of(
    heads: str, tied: bool, attention_bias: bool, mlp_bias: bool, head_dim: int, dtype: str
) -> Any:
    queries, keys = HEADS[heads]
    return tiny_model(
        num_attention_heads=queries,
        num_key_value_heads=keys,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        head_dim=head_dim,
    ).to(DTYPES[dtype])


def place_of(folder: Path, name: str) -> Path:
    return folder / (f"{name}.gguf" if name == "gguf" else name)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def require_equal(directory: Path, model: Any) -> None:
    """`directory` holds the tensors of `model`, bit for bit, and transformers loads it whole."""
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    tensors = weights(directory)
    assert same(tensors, expected) == []
    loaded, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not any(report[kind] for kind in report), report
    assert loaded.dtype == model.dtype


NEW = {"maxtext", "dcp", "litgpt"}  # their own tests cover by default what is asked of all formats


def slow_if_new(name: str) -> Any:
    """The parameter `name`, marked slow for a format in NEW."""
    return pytest.param(name, marks=pytest.mark.slow if name in NEW else ())


@pytest.mark.parametrize(
    "through", [slow_if_new(name) for name in writable() if name not in ("meta", "maxtext")]
)
def test_the_matrix_comes_back_bitwise(tmp_path: Path, through: str) -> None:
    """Meta's and MaxText's formats know no biases; theirs are in test_meta.py and test_maxtext.py."""
    # every other one where nothing is stacked or turned
    for number, options in enumerate(MATRIX[:: 2 if through == "hf" else 1]):
        if through == "litgpt" and options["attention_bias"] != options["mlp_bias"]:
            continue  # it has one switch for both
        folder = tmp_path / str(number)
        model = model_of(**options)
        model.save_pretrained(folder / "model", max_shard_size="20KB" if number % 2 else "5GB")
        convert.convert(folder / "model", place_of(folder, through), to=through)
        convert.convert(place_of(folder, through), folder / "back")
        tensors = weights(folder / "back")
        expected = weights(folder / "model")
        assert same(tensors, expected) == [], options
        fields = json.loads((folder / "back/config.json").read_text())
        assert fields["head_dim"] == options["head_dim"]
        assert fields["dtype"] == fields["torch_dtype"] == options["dtype"]
        if number % 12 == 0:
            require_equal(folder / "back", model)
        shutil.rmtree(folder)


PAIRS = [
    pytest.param(*pair, marks=pytest.mark.slow if NEW & {*pair} and "hf" not in pair else ())
    for pair in itertools.product(writable(), writable())
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_pair(tmp_path: Path, source: str, target: str) -> None:
    # MaxText divides queries by sqrt(head_dim), which is 4
    model = tiny_model(hidden_size=64, tie_word_embeddings=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first, second = place_of(tmp_path / "one", source), place_of(tmp_path / "two", target)
    convert.convert(tmp_path / "model", first, to=source)
    convert.convert(first, second, to=target)
    facts = json.loads(record.record_path(second).read_text())
    assert facts["verified"] is True
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    convert.convert(second, tmp_path / "back")
    require_equal(tmp_path / "back", model)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64),
    st.sampled_from([np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]),
)
def test_changes_are_counted(values: list[float], dtype: np.dtype) -> None:
    before = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        after = before.astype(dtype)
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)
    pairs = [
        (float(b), float(a)) for b, a in zip(before, after, strict=True) if float(b) != float(a)
    ]
    expected = Changes(
        len(pairs),
        sum(a == 0 for _, a in pairs),
        sum(0 < abs(a) < smallest for _, a in pairs),
    )
    assert changes(before, after) == (expected if pairs else None)


def test_what_a_cast_changes_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from convert.__main__ import main

    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[:3] = torch.tensor([1e-9, 3e-6, 1.0])
    model.save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    assert "1 became zero, " in capsys.readouterr().err
    changed = json.loads((tmp_path / "half" / record.FILE).read_text())["tensors"]
    assert changed["model.norm.weight"]["changed"]["to_zero"] == 1
    assert changed["model.norm.weight"]["changed"]["subnormal"] == 1
    with torch.no_grad():
        model.model.norm.weight[0] = 70000.0
    model.save_pretrained(tmp_path / "large")
    assert main([str(tmp_path / "large"), str(tmp_path / "none"), "--dtype", "float16"]) == 2
    assert "model.norm.weight: 1 values overflow float16" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path / "model")
    mixed = model.state_dict()
    convert.convert(tmp_path / "model", tmp_path / "copy")
    assert same(weights(tmp_path / "copy"), mixed) == []
    convert.convert(tmp_path / "model", tmp_path / "orbax", to="orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert same(weights(tmp_path / "back"), mixed) == []


def test_orbax_restores_what_was_converted(tmp_path: Path) -> None:
    """Into the model's own tree, by Orbax alone."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    convert.convert(tmp_path / "model", tmp_path / "orbax", to="orbax")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    from flax import nnx

    expected = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), expected
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "orbax/params", abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_safetensors_alone_reads_it(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    convert.convert(tmp_path / "model", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(list(file.keys())) == 21


def killed_at(share: float, total: int, source: Path, out: Path, to: str) -> int:
    """The exit code of a conversion that is killed once it has written this share of `total` bytes."""
    earlier = {*out.parent.iterdir()}
    command = [sys.executable, "-m", "convert", str(source), str(out), "--to", to]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        partial = {*out.parent.glob("*.partial")} - earlier
        if partial and sum(sum(sizes(each).values()) for each in partial) >= share * total:
            process.kill()
        time.sleep(0.002)
    return process.returncode


def sizes(directory: Path) -> dict[Path, int]:
    """Of every file, but the one in which Orbax notes when and where it was done."""
    found = {}
    for folder, _, files in os.walk(directory):
        for path in (Path(folder, name) for name in files):
            with suppress(FileNotFoundError):  # renamed meanwhile
                if path.name not in ("commit_success.txt", "_CHECKPOINT_METADATA"):
                    found[path.relative_to(directory)] = path.stat().st_size
    return found


def random_model(directory: Path, megabytes: int) -> Path:
    """A Hugging Face directory of one layer whose embedding takes so many megabytes."""
    model = tiny_model(hidden_size=64, num_hidden_layers=1)
    rows = megabytes * 2**20 // (64 * 2)
    model.config.vocab_size = rows
    model.config.save_pretrained(directory)
    specs = [
        TensorSpec(
            name,
            np.dtype(ml_dtypes.bfloat16),
            (rows, 64) if "embed" in name or "lm_head" in name else tuple(tensor.shape),
        )
        for name, tensor in model.state_dict().items()
    ]
    generator = np.random.default_rng(0)

    def values(name: str) -> np.ndarray:
        spec = next(spec for spec in specs if spec.name == name)
        bits = generator.integers(0, 2**16, spec.size, dtype=np.uint16)
        return ((bits & 0x83FF) | 0x3C00).view(spec.dtype).reshape(spec.shape)

    write_safetensors(directory, specs, values)
    return directory


@pytest.mark.parametrize(
    ("quantized", "to"),
    [
        (None, "orbax"),
        *(
            pytest.param(quantized, to, marks=pytest.mark.slow)
            for quantized, to in (
                *((None, to) for to in writable() if to != "orbax"),
                ("q8_0", "hf"),
                ("fp8", "hf"),
            )
        ),
    ],
)
def test_a_killed_conversion_leaves_no_destination_and_the_next_one_cleans_up(
    tmp_path: Path, quantized: str | None, to: str
) -> None:
    source = random_model(tmp_path / "model", 64)
    if quantized is not None:
        stored = place_of(tmp_path, "gguf" if quantized == "q8_0" else "fp8")
        source = convert.convert(source, stored, dtype=quantized)
    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()
    out.mkdir()
    convert.convert(source, place_of(whole, to), to=to)
    expected = sizes(whole)
    total = sum(expected.values())
    # with 0.99 it is killed as it reads back what it wrote, or a moment before
    for share in (0, 0.5, 0.99):
        assert killed_at(share, total, source, place_of(out, to), to) == -signal.SIGKILL
        (left,) = out.iterdir()  # nothing of the one before
        assert left.name.endswith(".partial")
    assert killed_at(2, total, source, place_of(out, to), to) == 0
    assert sizes(out) == expected
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


# of its own image: what wait4 says of a child begins with what its parent had when it forked
_MEASURED = """
import re, sys
from convert.__main__ import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def peak_memory(*arguments: str | Path) -> int:
    """Bytes that a process of the converter with these arguments needs at most."""
    command = [sys.executable, "-c", _MEASURED, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


@pytest.mark.parametrize("to", [slow_if_new(name) for name in writable()])
def test_memory_is_three_of_the_largest_tensor(tmp_path: Path, to: str) -> None:
    """Peak RSS <= 600 MB + 3 x the largest tensor, out of Hugging Face and back into it."""
    megabytes = 256
    source = random_model(tmp_path / "model", megabytes)
    out = place_of(tmp_path, to)
    for first, second in ((source, out), (out, tmp_path / "back")):
        peak = peak_memory(first, second, "--to", to if second == out else "hf")
        assert peak <= 600e6 + 3 * megabytes * 2**20
    assert same(weights(tmp_path / "back"), weights(source)) == []


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system does not offer it")
def test_a_large_conversion_does_not_stay_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    advised: list[str] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        advised.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    convert.convert(tmp_path / "model", tmp_path / "small")
    assert not advised
    monkeypatch.setattr(page_cache, "_SHARE", 2**40)
    monkeypatch.setattr(page_cache, "_STEP", 1)
    convert.convert(tmp_path / "model", tmp_path / "out")
    tensors = len(weights(tmp_path / "out"))
    source = str((tmp_path / "model/model.safetensors").resolve())
    assert advised.count(source) == tensors
    # as it is written, and as it is read back
    written = [place for place in advised if "partial" in place]
    assert {Path(place).name for place in written} >= {"model.safetensors"}
    assert sum(place.endswith("/model.safetensors") for place in written) == 2 * tensors


def test_a_plan_says_what_it_will_cost(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    todo = convert.plan(tmp_path / "model", tmp_path / "out", dtype="bfloat16")
    convert.run(todo)
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert 0 <= size - todo.bytes_to_write < 5000
    assert todo.peak_memory >= 600e6
    assert todo.seconds > 0
