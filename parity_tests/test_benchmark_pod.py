"""The comparison with MaxText: what it asks of MaxText, what it reads back, its mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pod
from benchmarks.pod import CASES, maxtext, maxtext_settings, read_rows, table, with_row

HLO = """\
HloModule step, is_scheduled=true, num_partitions=64

ENTRY %main (x: bf16[64,1000000]) -> bf16[4096,1000000] {
  %x = bf16[64,1000000]{1,0} parameter(0)
  ROOT %y = bf16[4096,1000000]{1,0} all-gather(%x), replica_groups={}, dimensions={0}
}
"""
SENT = 63 * 64 * 1e6 * 2  # bytes of the parts of the other 63

# in place of MaxText's interpreter: writes what maxtext_step.py would
INTERPRETER = """\
#!{python}
import json, os, sys
if "TPU_LIBRARY_PATH" in os.environ:
    sys.exit("another interpreter's libtpu")
out, words = sys.argv[2], sys.argv[3:]
if "remat_policy=full" not in words:
    sys.exit("first line\\nno such policy")
open(out + ".hlo", "w").write({hlo!r})
versions = dict(jax="1.2", libtpu="0.3", maxtext="9")
json.dump(dict(peak=2**30, compile_seconds=1.0, versions=versions), open(out + ".json", "w"))
"""


def row(case: str, program: str, jax: str = "1.2", peak: float = 2.0**30) -> dict[str, Any]:
    versions = {"jax": jax, "libtpu": "0.3"}
    seconds = {"link_seconds": 0.5, "exposed_seconds": 0.25, "compile_seconds": 60.0}
    return {"case": case, "program": program, "versions": versions, "peak": peak,
            "sent": {"all-gather": 2e9}, **seconds}  # fmt: skip


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    file = tmp_path / "python"
    file.write_text(INTERPRETER.format(python=sys.executable, hlo=HLO))
    file.chmod(0o755)
    return file


def test_settings() -> None:
    """512 rows over 512 chips; types of v5p count cores, two a chip."""
    settings = maxtext_settings(CASES["70b"], "")
    assert settings["compile_topology"] == "v5p-1024"
    assert settings["model_name"] == "llama3.1-70b"
    assert settings["per_device_batch_size"] == 1
    assert settings["ici_fsdp_parallelism"] == 128
    assert settings["ici_tensor_parallelism"] == 4
    assert maxtext_settings(CASES["8b-32k"], "")["ici_context_parallelism"] == 4
    assert maxtext_settings(CASES["8b"], "vocabulary in 8 tiles")["num_vocab_tiling"] == 8
    assert "num_vocab_tiling" not in maxtext_settings(CASES["8b"], "")


def test_maxtext_is_read_with_our_ruler(interpreter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/of/this/interpreter/libtpu.so")
    read = maxtext("8b", "", interpreter)
    assert read["program"] == "MaxText"
    assert read["versions"]["maxtext"] == "9"
    assert read["sent"] == {"all-gather": SENT}
    assert read["link_seconds"] == read["exposed_seconds"] == pytest.approx(SENT / 600e9)


def test_maxtext_that_fails_is_one_line(interpreter: Path) -> None:
    with pytest.raises(ValueError) as caught:
        maxtext("8b-dots", "", interpreter)
    assert str(caught.value).endswith("exit code 1: no such policy")


def test_no_interpreter(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        pod.main(["--maxtext-python", str(tmp_path / "none")])
    assert str(caught.value) == f"maxtext-python: {tmp_path / 'none'} is not an executable file"


def test_rows_are_kept_by_case_program_and_versions(tmp_path: Path) -> None:
    rows = [row("8b", "llama_jax"), row("8b", "MaxText"), row("405b", "llama_jax")]
    rows = with_row(rows, row("8b", "llama_jax", peak=7.0))
    assert sorted(each["peak"] for each in rows) == [7.0, 2.0**30, 2.0**30]
    rows = with_row(rows, row("70b", "llama_jax", jax="1.3"))
    assert [each["case"] for each in rows] == ["8b", "8b", "70b", "405b"]
    file = tmp_path / "pod.json"
    assert read_rows(file) == read_rows(None) == []
    file.write_text(json.dumps(rows))
    assert read_rows(file) == rows
    assert table(rows).row_count == 4


@pytest.mark.parametrize("text", ["{", "[1]", '{"case": 1}', '[{"case": "8b"}]'])
def test_another_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "pod.json"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_rows(file)
    assert str(caught.value) == f"json: {file} is not a file of this benchmark"


def test_a_compiled_case(interpreter: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Both programs, one after the other, into one file; our plan is stood in for."""
    monkeypatch.setattr(pod, "ours", lambda name: row(name, "llama_jax"))
    file = tmp_path / "pod.json"
    pod.main(["--maxtext-python", str(interpreter), "--cases", "8b", "--json", str(file)])
    programs = [each["program"] for each in json.loads(file.read_text())]
    assert programs == ["llama_jax", "MaxText", "MaxText, vocabulary in 8 tiles"]
    assert "MaxText, vocabulary in 8 tiles: 1.0 GiB" in capsys.readouterr().out
