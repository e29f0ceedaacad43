"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import convert
import llama_jax
import llama_jax.loss
import llama_jax.scoring

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PACKAGES = (llama_jax, convert)
FACES = (llama_jax, llama_jax.loss, llama_jax.scoring)


def modules_with_examples() -> Iterator[str]:
    for package in PACKAGES:
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__"):
                module = importlib.import_module(info.name)
                if ">>> " in inspect.getsource(module):
                    yield info.name


def public_names() -> Iterator[tuple[ModuleType, str]]:
    for face in FACES:
        for name in face.__all__:
            if callable(getattr(face, name)):
                yield face, name


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example may save
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("face", "name"), [pytest.param(face, name, id=name) for face, name in public_names()]
)
def test_every_public_name_has_an_example(face: ModuleType, name: str) -> None:
    public = getattr(face, name)
    if not inspect.isclass(public) and not inspect.isfunction(public):
        return  # a Literal has the docstring of `typing`
    assert ">>> " in (inspect.getdoc(public) or "")
