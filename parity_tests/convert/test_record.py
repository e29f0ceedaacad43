"""`conversion.json` may be anybody's: digests, or one line that says there are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert import convert, info
from convert.record import FILE
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_gguf


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("record")
    return convert(tiny_gguf(home / "m.gguf"), home / "out")


@pytest.mark.parametrize(
    "tensors",
    [None, 0, [], "x", {"a": None}, {"a": {}}, {"a": {"sha256": None}}, {"a": {"sha256": "zz"}}],
    ids=str,
)
def test_damaged_records(directory: Path, tensors: Any) -> None:
    path = directory / FILE
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"tensors": tensors}))
    try:
        (problem, *_) = info(directory)["problems"]
    finally:
        path.write_text(before)
    assert "has no SHA-256 for each tensor" in problem
    assert info(directory)["problems"] == []
