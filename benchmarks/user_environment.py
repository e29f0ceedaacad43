"""The environment of a command as its user has it.

Python compiles a source when it is first imported, and then keeps the bytecode. Where variables of this
process forbid that, each start would compile all sources again.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def user_environment() -> Iterator[Mapping[str, str]]:
    """Variables with which bytecode is kept, in a folder that is empty at first and removed at the end.

    Every command is to run once before it is measured.
    """
    with tempfile.TemporaryDirectory() as bytecode:
        variables = os.environ | {"PYTHONPYCACHEPREFIX": bytecode}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        yield variables
