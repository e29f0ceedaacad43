"""Checkpoints from one format into another, a tensor at a time, and proved.

python -m convert SRC DST      and the same as functions:

from convert import convert, info
convert("model.gguf", "model/", dtype="bfloat16")
"""

from convert.conversion import Plan, Report, convert, info, plan, run

__all__ = ["Plan", "Report", "convert", "info", "plan", "run"]
