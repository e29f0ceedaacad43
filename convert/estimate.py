"""How long a conversion will take, estimated from a short trial."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

from llama_jax.files.staging import writing

_PROBE = 2**25  # bytes: enough to see a rate, a fraction of a second


def seconds(parent: Path, *, read: int, written: int, verify: bool) -> float:
    """Estimated time of a conversion into the directory `parent`.

    The trial writes 32 MB to a temporary file there and digests them.

    Args:
        read: bytes of all tensors in the source.
        written: bytes of all tensors in the output.
        verify: whether the output is read back.
    """
    block = os.urandom(_PROBE)
    start = time.perf_counter()
    with writing(parent), tempfile.TemporaryFile(dir=parent) as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
    write_rate = _PROBE / (time.perf_counter() - start)
    start = time.perf_counter()
    hashlib.sha256(block).digest()
    digest_rate = _PROBE / (time.perf_counter() - start)
    # tensors are digested while others are written; reading back waits for each digest
    total = written / write_rate + read / (2 * digest_rate)
    return total + (written / digest_rate if verify else 0.0)
