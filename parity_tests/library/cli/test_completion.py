"""`--print-completion`: what the script completes, in bash itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.__main__ import main as benchmarks
from convert.__main__ import main as convert
from llama_jax.__main__ import main as llama_jax
from parity_tests.__main__ import main as parity_tests
from train.__main__ import main as train

PROGRAMS = {
    "llama_jax": llama_jax,
    "train": train,
    "convert": convert,
    "parity_tests": parity_tests,
    "benchmarks": benchmarks,
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """All scripts, as a user has them who works with all programs."""
    for main in PROGRAMS.values():
        with pytest.raises(SystemExit):
            main(["--print-completion", "bash"])
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out)
    return tmp_path / "completion.bash"


def completed(script: Path, line: str) -> list[str]:
    """What bash offers for the last word of a line; the sign = is a word, as in COMP_WORDBREAKS."""
    words = line.replace("=", " = ").split(" ")
    call = (
        f"source {script}; COMP_WORDS=({' '.join(repr(w) for w in words)}); "
        f"COMP_CWORD={len(words) - 1}; "
        f"$(complete -p {words[0]} | sed 's/.* -F \\([^ ]*\\) .*/\\1/'); "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python -m llama_jax ge", ["generate"]),
        ("python -m llama_jax ", ["generate", "chat", "info", "mask", "score", "quantize"]),
        ("python -m llama_jax --v", ["--version"]),
        ("python -m llama_jax generate --to", ["--top-k", "--top-p"]),
        ("python -m llama_jax generate --model DIR --dtype ", ["float32", "bfloat16", "float16"]),
        ("python -m llama_jax mask --padding-side=l", ["left"]),
        ("python -m llama_jax mask --padding-side=", ["left", "right"]),
        ("python -m llama_jax quantize --model ", []),  # names of files
        ("llama-jax score --ro", ["--rolling"]),
        ("llama-jax in", ["info"]),
        (
            "python -m train run --model.re",
            [
                "--model.reduce-dtype",
                "--model.remat",
                "--model.remat-save",
                "--model.remat-offload",
            ],
        ),
        ("python -m train run --model.attention b", ["blocked"]),
        ("python -m train resume RUN --log.no", ["--log.no-tensorboard"]),
        ("python -m train run --toml ", []),
        ("python -m convert SRC DST --to m", ["maxtext", "meta"]),
        ("python -m convert in", ["info"]),
        ("python -m convert ", []),
        ("python -m convert info SRC --", ["--help", "--map", "--rope", "--json"]),
        ("python -m parity_tests report DIR --ba", ["--backward"]),
        ("python -m benchmarks compile st", ["start", "step"]),
        ("python -m other --he", []),
        ("python -m ", []),
        ("python --he", []),
    ],
)
def test_completions(scripts: Path, line: str, expected: list[str]) -> None:
    assert completed(scripts, line) == expected


def test_the_script_of_zsh_is_that_of_bash(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for shell in ("bash", "zsh"):
        with pytest.raises(SystemExit):
            llama_jax(["--print-completion", shell])
        printed.append(capsys.readouterr().out)
    assert printed[1].endswith(printed[0])
    assert "bashcompinit" in printed[1]
