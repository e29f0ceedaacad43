"""`python -m convert`: its exit codes, its one line of error, and nothing half written."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import convert
from convert.__main__ import main
from llama_jax.cli.arguments import size_argument
from parity_tests.convert.formats.gguf.test_tokenizer_read import byte_level_fields
from parity_tests.convert.formats.gguf.tiny_gguf import same, tiny_gguf, tiny_model
from parity_tests.harness.child_process import ROOT
from parity_tests.harness.demo_checkpoint import FILE, cache_directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    fields = byte_level_fields("smollm")
    model = tiny_model(vocab_size=len(fields["tokenizer.ggml.tokens"]))
    return tiny_gguf(tmp_path / "m.gguf", model, fields=fields)


def error_of(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of error that a failing command prints, after whatever it said before."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert err.count("error: ") == 1
    return last


def test_a_conversion_says_what_it_costs_and_is_read_by_transformers(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(source), str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    parameters = convert.info(source)["parameters"]
    assert f"{parameters:,} parameters in 21 tensors" in err
    assert "to Hugging Face, float32: 186.8 kB of disk, at most 600.2 MB of memory, about" in err
    assert "read back and compared: 21 tensors, bit for bit" in err
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "conversion.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_shards_and_dtype(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(source), str(out), "--max-shard-size", "40KB", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    convert.convert(source, tmp_path / "whole", dtype="bfloat16")
    tensors = {k: v for p in out.glob("*.safetensors") for k, v in load_file(p).items()}
    assert same(tensors, load_file(tmp_path / "whole/model.safetensors")) == []
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    assert main([str(source), str(tmp_path / "out"), "--dry-run"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_info_in_words_and_in_json(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(source)]) == 0
    words = capsys.readouterr().out
    assert "config.hidden_size" in words
    assert "smollm" in words
    assert main(["info", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["hidden_size"] == 32


def test_info_of_a_file_whose_tokenizer_is_unknown(tmp_path: Path) -> None:
    fields = byte_level_fields("klingon")
    model = tiny_model(vocab_size=len(fields["tokenizer.ggml.tokens"]))
    facts = convert.info(tiny_gguf(tmp_path / "m.gguf", model, fields=fields))
    assert "klingon" in facts["problems"][0]
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_user_mistakes(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert "nowhere.gguf: not found" in error_of([tmp_path / "nowhere.gguf", out], capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "an empty directory; expected one of: Hugging Face" in error_of([empty, out], capsys)
    assert "is inside the source" in error_of([empty, empty / "a"], capsys)
    assert "exists already" in error_of([source, tmp_path], capsys)
    assert "no such directory; create it first" in error_of([source, tmp_path / "a/b/c"], capsys)
    assert "arguments are required: DST" in error_of([source], capsys)
    assert "--dtype: found 'int3', expected one of float32" in error_of(
        [source, out, "--dtype", "int3"], capsys
    )
    assert "'0GB', expected a size" in error_of([source, out, "--max-shard-size", "0GB"], capsys)
    text = tmp_path / "text.gguf"
    text.write_text("hello, this is not a model at all, nor anything like it")
    assert "starts with b'hell', expected b'GGUF'" in error_of([text, out], capsys)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "1000 bytes free, expected at least" in error_of([source, out], capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "m.gguf", "text.gguf"]


def test_an_error_half_way_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = np.full(32, np.inf, np.float32)
    path = tiny_gguf(tmp_path / "m.gguf", tensors={"output_norm.weight": bad})
    assert "model.norm.weight: 32 values are NaN" in error_of([path, tmp_path / "out"], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert "No space left on device" in error_of([source, tmp_path / "out"], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_destination_that_appears_meanwhile_is_kept(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    todo = convert.plan(source, out)
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists, expected it to be absent"):
        convert.run(todo)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(
    source: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    slow = (
        "import signal, sys, time, convert.formats.gguf.tensors as t; f = t.read_values\n"
        # a suite run in the background hands down an ignored SIGINT
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def g(x): print('reading', flush=True); time.sleep(60); return f(x)\n"
        "t.read_values = g\n"
        "from convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(source), str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        assert any(p.name.startswith(".out.") for p in tmp_path.iterdir())
        process.send_signal(signum)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: nothing was written" in err
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_heap_is_kept_before_the_source_is_opened() -> None:
    # Threads that TensorStore starts before it would get new memory for every large array. In a process of
    # its own, since what the heap does depends on what was in it.
    code = """
import convert.conversion
from convert.__main__ import main
from llama_jax.files.memory import resident_memory

def plan(*arguments, **options):
    array = bytearray(2**26)
    array[:: 2**12] = bytes(2**14)
    before = resident_memory()
    del array
    print(resident_memory() > before - 2**25)
    raise ValueError

convert.plan = convert.conversion.plan = plan
for call in (plan, main, convert.convert):
    try:
        call(["from", "to"]) if call is main else call("from", "to")
    except ValueError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_the_command_needs_no_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("500MB", 5 * 10**8), ("1.5K", 1500), ("77", 77)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_argument(text) == size


@pytest.mark.checkpoint
def test_the_real_checkpoint(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: tensors and tokens equal to transformers' own reading of the file."""
    path = cache_directory() / FILE
    if not path.is_file():
        pytest.skip(f"{path} is absent; `make demo` fetches it")
    started = time.monotonic()
    directory = convert.convert(path, tmp_path / "out")
    assert time.monotonic() - started < 60
    model = LlamaForCausalLM.from_pretrained(directory)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert same(load_file(directory / "model.safetensors"), expected) == []
    config = model.config
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (100000.0, 1e-5)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
