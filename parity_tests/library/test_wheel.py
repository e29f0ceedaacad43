"""The wheel holds the library alone and runs where torch, convert and the tests are not."""

import subprocess
import sys
import zipfile

import pytest

from parity_tests.harness.child_process import ROOT

FORWARD = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "tokenizers", "gguf", "convert"}:
            raise ImportError(f"{name} is not to be needed")

sys.meta_path.insert(0, Absent())
import jax.numpy as jnp
from flax import nnx
import llama_jax
from llama_jax import LlamaConfig, LlamaForCausalLM

assert llama_jax.__file__.startswith(sys.argv[1]), llama_jax.__file__
config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=2, max_position_embeddings=8)
model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
model.save_pretrained(sys.argv[1] + "/model")
model = LlamaForCausalLM.from_pretrained(sys.argv[1] + "/model")
print(model(jnp.ones((1, 4), jnp.int32)).logits.shape)
"""


@pytest.mark.slow
def test_the_wheel_runs_without_torch_and_ships_only_the_library(tmp_path):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    subprocess.run((*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT), check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"llama_jax"}
    target = tmp_path / "installed"
    subprocess.run((*pip, "install", "--no-deps", "--target", target, wheel), check=True)
    done = subprocess.run(
        (sys.executable, "-c", FORWARD, str(target)),
        env={"PYTHONPATH": str(target), "PATH": "", "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "(1, 4, 16)\n", done.stderr
    done = subprocess.run(
        (sys.executable, target / "bin" / "llama-jax", "info", "llama-7b", "--sequences"),
        env={"PYTHONPATH": str(target), "PATH": "", "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: unknown option --sequences (did you mean --seq?); see llama-jax info --help\n"
    )
