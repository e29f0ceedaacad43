"""The demo's checkpoint, converted to a temporary Hugging Face directory."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import convert
from parity_tests.harness import demo_checkpoint


@contextmanager
def real_checkpoint() -> Iterator[Path]:
    """Its directory. The download is kept for next time, the conversion is not."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        convert.convert(demo_checkpoint.fetch(), directory)
        yield directory
