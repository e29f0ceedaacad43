"""`python -m benchmarks NAME...`: measurements, each printed as one table."""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import importlib
import sys
from typing import Any

from llama_jax.cli.arguments import program_parser
from llama_jax.cli.program import leave, run_program

MODULES = {
    "compile": "compile_time",
    "convert": "conversion",
    "decode": "decode",
    "gpu": "gpu",
    "harness": "harness",
    "load": "load_time",
    "loss": "loss",
    "parity": "parity",
    "pod": "pod",
    "precision": "precision",
    "prefix": "shared_context",
    "pretrain": "pretraining",
    "restart": "restart",
    "start": "start_up",
    "step": "step",
    "transfer": "transfer",
}
WITH_OPTIONS = ("convert", "decode", "gpu", "harness", "parity", "pod", "transfer")

_EPILOG = """\
compile    compile time of 32 layers against that of 4, forward and gradient
convert    every pair of formats: time against `cp`, peak memory (options: convert --help)
decode     greedy decoding and prefill against transformers and llama.cpp (options: decode --help)
gpu        on an NVIDIA GPU: its tests, step, loss and decode, results kept (options: gpu --help)
harness    lm_eval with our model class and with its own for PyTorch (options: harness --help)
load       from_pretrained of a bfloat16 directory against `cat` of the same file; peak memory
loss       the fused loss against plain JAX, torch and other fused losses: memory, time and error
parity     our error against transformers', real checkpoint and every preset (options: parity --help)
pod        the step compiled for slices of TPUs, beside MaxText's: memory, traffic (options: pod --help)
precision  what lower precision of float32 matmuls does to the real checkpoint
prefix     16 continuations of one context against one; a turn of a chat with and without its cache
pretrain   validation loss after the demo's two minutes, and nanochat's in torch after the same time
restart    time until the first step of a new run, and of the same run resumed
start      imports, and generate as a whole command against transformers: first and second run
step       a training step against torch: time, memory, tokens per second
transfer   the best learning rate of each width under muP (options: transfer --help)
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks one after another. Mistakes are one line on stderr and exit code 2."""
    words = sys.argv[1:] if arguments is None else arguments

    def command() -> None:
        if words and words[0] in WITH_OPTIONS and (len(words) == 1 or words[1].startswith("-")):
            _module(words[0]).main(words[1:])
            return
        parser = program_parser("python -m benchmarks", "Run benchmarks.", epilog=_EPILOG)
        parser.add_argument(
            "names",
            nargs="+",
            choices=MODULES,
            metavar="NAME",
            help="benchmarks to run, in this order",
        )
        for name in parser.parse_args(words).names:
            _module(name).main()

    return run_program(command, extra="dev")


def _module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{MODULES[name]}")


if __name__ == "__main__":
    leave(main())
