"""Checkpoints from one format into another, a tensor at a time, and proved.

python -m convert SRC DST      and the same as functions:

from convert import convert, info
convert("model.gguf", "model/", dtype="bfloat16")
"""

import signal
import sys

# `python -m convert` begins when all this is imported: until then Ctrl-C ends it without a traceback
if (
    sys.argv[:1] == ["-m"]
    and "convert" in sys.orig_argv
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from convert.conversion import Plan, Report, convert, info, plan, run

__all__ = ["Plan", "Report", "convert", "info", "plan", "run"]
