"""`python -m benchmarks NAME...`: measurements, each printed as one table.

compile    seconds to compile 4 and 32 layers of the same widths, forward and gradient
convert    every pair of formats: seconds beside `cp`, peak memory (--preset, --pairs)
decode     greedy decoding beside Hugging Face's: tokens a second, and a prefill
load       from_pretrained of a bfloat16 directory against `cat` of the same file; peak RSS
loss       the loss-in-head beside its peers: memory, time and error
parity     our error and Hugging Face's, of the real checkpoint and of every preset (--presets)
precision  what lower precisions of float32 products do to the real checkpoint
step       a training step beside torch's: time, memory, tokens a second
"""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
import importlib

from llama_jax.cli.arguments import OneLineParser
from llama_jax.cli.program import leave, run_program

MODULES = {
    "compile": "compile_time",
    "convert": "conversion",
    "decode": "decode",
    "load": "load_time",
    "loss": "loss",
    "parity": "parity",
    "precision": "precision",
    "step": "step",
}
WITH_OPTIONS = ["convert"], ["parity"]


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks in turn. A user's mistake is one line on stderr and exit code 2."""

    def command() -> None:
        parser = OneLineParser(
            prog="python -m benchmarks",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("names", nargs="+", choices=MODULES, metavar="NAME")
        options, rest = parser.parse_known_args(arguments)
        if rest and options.names not in WITH_OPTIONS:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        for name in options.names:
            module = importlib.import_module(f"benchmarks.{MODULES[name]}")
            module.main(rest) if rest else module.main()

    return run_program(command, extra="dev")


if __name__ == "__main__":
    leave(main())
