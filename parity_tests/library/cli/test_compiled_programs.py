"""Compiled programs that a command keeps for the next one."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx
from tokenizers import Tokenizer, models

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.__main__ import main
from llama_jax.cli import compiled_programs
from llama_jax.cli.compiled_programs import keep_compiled_programs
from parity_tests.harness.child_process import ROOT

PROGRAMS = {"jit__prefill", "jit__decode"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(path)
    Tokenizer(models.WordLevel({"the": 5}, unk_token="the")).save(str(path / "tokenizer.json"))
    return path


def generate(directory: Path, *more: str, prompt: str = "the", **variables: str) -> str:
    """What a new process says on stderr."""
    command = (sys.executable, "-m", "llama_jax", "generate", "--model", str(directory))
    result = subprocess.run(
        (*command, "--prompt", prompt, "--max-new-tokens", "3", *more),
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def found_by(directory: Path, *more: str, **variables: str) -> set[str]:
    """The programs that a new process finds compiled."""
    said = generate(directory, *more, JAX_LOG_COMPILES="1", **variables)
    return set(re.findall(r"Persistent compilation cache hit for '(\w+)'", said))


def test_the_next_command_finds_what_this_one_compiled(directory, tmp_path):
    there = {"XDG_CACHE_HOME": str(tmp_path)}
    os.environ.pop("LLAMA_JAX_CACHE")
    try:
        assert not found_by(directory, **there) & PROGRAMS
        (kind,) = (tmp_path / "llama_jax/compiled").iterdir()
        assert kind.stat().st_mode & 0o077 == 0
        assert found_by(directory, **there) >= PROGRAMS
        # a prompt of another length, padded to the same, needs no other program, however small
        said = generate(directory, prompt="the the the", JAX_EXPLAIN_CACHE_MISSES="1", **there)
        compiled = set(re.findall(r"CACHE MISS for '(\w+)'", said))
        assert compiled <= {
            "jit__threefry_seed",
            "jit_stage",
        }  # of jax.random.key, too fast to be kept
        assert not found_by(directory, "--no-cache", **there)
        assert not found_by(directory, "--cache", str(tmp_path / "other"), **there) & PROGRAMS
        for file in kind.glob("*-cache"):
            file.write_bytes(b"damaged")
        assert "cache" not in generate(directory, **there)
    finally:
        os.environ["LLAMA_JAX_CACHE"] = ""


@pytest.fixture
def updates(monkeypatch):
    """What is set in JAX's configuration."""
    found: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    return found


NOTHING = argparse.Namespace(cache=None, no_cache=False)


@pytest.mark.parametrize(
    "variables",
    [
        {"LLAMA_JAX_CACHE": ""},
        {"LLAMA_JAX_CACHE": "/dev/null/cache"},
        {"LLAMA_JAX_CACHE": "cache", "JAX_COMPILATION_CACHE_DIR": "/tmp/jax"},
        {"LLAMA_JAX_CACHE": None, "XDG_CACHE_HOME": "/dev/null"},
        {"LLAMA_JAX_CACHE": None, "XDG_CACHE_HOME": "relative", "HOME": None},
    ],
    ids=["none", "no directory", "JAX's own", "no cache", "no home"],
)
def test_nothing_is_set(monkeypatch, updates, tmp_path, variables):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user whom the system does not know
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    keep_compiled_programs(NOTHING)
    assert not updates
    assert not list(tmp_path.iterdir())


def test_a_folder_for_each_kind_of_machine(monkeypatch, updates, tmp_path):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    for version in ("1.0", "2.0"):
        monkeypatch.setattr("jaxlib.__version__", version)
        keep_compiled_programs(NOTHING)
        assert updates["jax_compilation_cache_max_size"] == compiled_programs.LARGEST
        assert Path(str(updates["jax_compilation_cache_dir"])).parent == tmp_path
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be(directory, tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    arguments = ["generate", "--model", str(directory), "--prompt", "the", "--cache", str(file)]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}")
    assert main([*arguments[:-1], "memory://bucket/cache"]) == 2
    assert capsys.readouterr().err.startswith("error: --cache: memory:/")
    monkeypatch.setenv("LLAMA_JAX_CACHE", "memory://bucket/cache")
    assert main(arguments[:-2]) == 2
    assert capsys.readouterr().err.startswith("error: LLAMA_JAX_CACHE: memory:/")
    assert main([*arguments, "--no-cache"]) == 2
    assert "--no-cache: not allowed with argument --cache" in capsys.readouterr().err
