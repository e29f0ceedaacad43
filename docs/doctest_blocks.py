"""A griffe extension that shows the examples of docstrings as code, whatever section they are in."""

import re
from typing import Any

import griffe

# from a prompt to the next empty line
EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n *\S.*)*", re.MULTILINE)


class DoctestBlocks(griffe.Extension):
    """Puts a code fence around every paragraph of doctest examples."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for every object that griffe has loaded."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fence, obj.docstring.value)


def fence(example: re.Match[str]) -> str:
    """The example between fences, with the indentation that it has."""
    indent = example["indent"]
    return f"{indent}```pycon\n{example[0]}\n{indent}```"
