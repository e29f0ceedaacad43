"""The demo's checkpoint as a Hugging Face directory, for as long as it is needed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import convert
from convert import demo_checkpoint


@contextmanager
def real_checkpoint() -> Iterator[Path]:
    """Its directory. What `demo_checkpoint.fetch` has fetched once is kept; the conversion is not."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        convert.convert(demo_checkpoint.fetch(), directory)
        yield directory
