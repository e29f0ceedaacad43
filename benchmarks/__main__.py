"""`python -m benchmarks NAME...`: measurements, each printed as one table.

convert   every pair of formats: seconds beside `cp`, peak memory (--preset, --pairs)
compile   seconds to compile 4 and 32 layers of the same widths, forward and gradient
decode    greedy decoding beside Hugging Face's: tokens a second, and a prefill
loss      the loss-in-head beside its peers: memory, time and error
step      a training step beside torch's: time, memory, tokens a second
load      from_pretrained of a bfloat16 directory against `cat` of the same file; peak RSS
"""

import argparse
import importlib
import sys

MODULES = {
    "compile": "compile_time",
    "convert": "conversion",
    "decode": "decode",
    "load": "load_time",
    "loss": "loss",
    "step": "step",
}


def main() -> int:
    """Run the named benchmarks in turn."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=MODULES, metavar="NAME")
    options, rest = parser.parse_known_args()
    if rest and options.names != ["convert"]:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for name in options.names:
        module = importlib.import_module(f"benchmarks.{MODULES[name]}")
        module.main(rest) if rest else module.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
