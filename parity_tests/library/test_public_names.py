"""`from llama_jax import ...`: names are imported when they are used, and nothing before."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import subprocess
import sys

import pytest

import convert
import llama_jax
from parity_tests.harness.child_process import ROOT


def imported_for_type_checkers() -> dict[str, str]:
    """Names that the package imports under TYPE_CHECKING, with their modules."""
    (block,) = (
        node
        for node in ast.parse(inspect.getsource(llama_jax)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {
        alias.name: str(statement.module).removeprefix("llama_jax.")
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_type_checkers_see_the_names_that_programs_get() -> None:
    assert imported_for_type_checkers() == llama_jax._MODULE_OF
    assert sorted(llama_jax.__all__) == sorted(llama_jax._MODULE_OF)


@pytest.mark.parametrize("package", [llama_jax, convert])
def test_every_name_is_there(package) -> None:
    star: dict[str, object] = {}
    exec(f"from {package.__name__} import *", star)
    for name in package.__all__:
        assert name in dir(package)
        assert star[name] is getattr(package, name)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'x'"):
        _ = package.x


def test_classes_pickle_by_their_own_module() -> None:
    config = llama_jax.LlamaConfig(hidden_size=8, num_attention_heads=2)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(llama_jax.LlamaForCausalLM)) is llama_jax.LlamaForCausalLM


def test_a_package_is_imported_when_it_is_used() -> None:
    code = """
import sys
import convert, llama_jax
heavy = {"jax", "flax", "numpy", "torch", "transformers"}
assert not heavy & {*sys.modules}, heavy & {*sys.modules}
assert not hasattr(llama_jax, "no_such_name") and not hasattr(llama_jax, "__path_hooks__")
assert not heavy & {*sys.modules}
assert llama_jax.loss.fused_linear_cross_entropy is llama_jax.fused_linear_cross_entropy
from llama_jax import PRESETS, scoring
assert scoring.loglikelihood and "llama-3.1-8b" in PRESETS
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
