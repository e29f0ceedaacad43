"""Convert checkpoints between formats, one tensor in memory at a time, and check the result.

`python -m convert SRC DST`, and the same as functions:

    from convert import convert, info
    convert("model.gguf", "model/", dtype="bfloat16")

The names below are imported when they are first used (PEP 562), so that `python -m convert --help` answers
at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.conversion import Plan, Report, Surgery, convert, info, plan, run

__all__ = ["Plan", "Report", "Surgery", "convert", "info", "plan", "run"]

if not TYPE_CHECKING:  # or a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module("convert.conversion"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
