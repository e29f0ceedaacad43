"""`python -m benchmarks NAME...`: measurements, each printed as one table.

compile    compile time of 32 layers against that of 4, forward and gradient
convert    every pair of formats: time against `cp`, peak memory (--preset, --pairs)
decode     greedy decoding and prefill against transformers: tokens per second
load       from_pretrained of a bfloat16 directory against `cat` of the same file; peak memory
loss       the fused loss against plain JAX, torch and other fused losses: memory, time and error
parity     our error against transformers' on the real checkpoint and every preset (--presets)
precision  what lower precision of float32 matmuls does to the real checkpoint
step       a training step against torch: time, memory, tokens per second
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
    """Run the named benchmarks one after another. Mistakes are one line on stderr and exit code 2."""

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
