"""`python -m llama_jax generate|chat|score|mask|info|quantize`: the library from a shell."""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
from pathlib import Path

from llama_jax.cli.arguments import OneLineParser, positive
from llama_jax.cli.mask import add_mask
from llama_jax.cli.program import leave, run_program
from llama_jax.cli.quantize import add_quantize
from llama_jax.cli.score import add_score
from llama_jax.cli.text import DTYPES, add_commands


def main(arguments: list[str] | None = None) -> int:
    """Run one command. A user's mistake is one line on stderr and exit code 2."""

    def command() -> None:
        options = _parser().parse_args(arguments)
        options.command(options)

    return run_program(command)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m llama_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_commands(commands)
    info = commands.add_parser("info", help="the architecture: tensors, parameters, FLOPs, bytes")
    info.set_defaults(command=_info)
    info.add_argument("model", metavar="PRESET|DIR")
    info.add_argument("--batch", type=positive, default=1, metavar="B")
    info.add_argument(
        "--seq", type=positive, metavar="S", help="default: min(max_position_embeddings, 8192)"
    )
    add_mask(commands)
    add_score(commands, DTYPES)
    add_quantize(commands, DTYPES)
    return parser


def _info(options: argparse.Namespace) -> None:
    from llama_jax import PRESETS, LlamaConfig
    from llama_jax.inspection.architecture import show

    if options.model in PRESETS:
        config = PRESETS[options.model]
    elif Path(options.model).is_dir():
        config = LlamaConfig.from_pretrained(options.model)
    else:
        raise ValueError(
            f"{options.model}: neither a directory nor a preset, expected one of "
            f"{', '.join(PRESETS)}"
        )
    seq = options.seq or min(config.max_position_embeddings, 8192)
    show(options.model, config, batch=options.batch, seq=seq)


if __name__ == "__main__":
    leave(main())
