"""`python -m llama_jax generate|chat|score|mask|info|quantize`."""

from llama_jax.cli.startup import end_on_interrupt, restore_garbage_collection

if __name__ == "__main__":
    end_on_interrupt()

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from llama_jax.cli.arguments import Parser, positive, program_parser
from llama_jax.cli.chat import add_chat
from llama_jax.cli.completion import CONSOLE_SCRIPT
from llama_jax.cli.generate import add_generate
from llama_jax.cli.mask import add_mask
from llama_jax.cli.program import leave, run_program
from llama_jax.cli.quantize import add_quantize
from llama_jax.cli.score import add_score


def main(arguments: list[str] | None = None) -> int:
    """Run one command. A mistake in its arguments is one line on stderr and exit code 2."""

    def command() -> None:
        options = _parser().parse_args(arguments)
        options.command(options)

    try:
        return run_program(command)
    finally:
        restore_garbage_collection()


def console_script() -> NoReturn:
    """The program `llama-jax`."""
    leave(main(), at_once=True)


def _parser() -> Parser:
    named = Path(sys.argv[0]).name == CONSOLE_SCRIPT
    parser = program_parser(
        CONSOLE_SCRIPT if named else "python -m llama_jax",
        "Generate text with a Llama checkpoint, score text, inspect and quantize.",
    )
    add_generate(parser)
    add_chat(parser)
    _add_info(parser)
    add_mask(parser)
    add_score(parser)
    add_quantize(parser)
    return parser


def _add_info(program: Parser) -> None:
    parser = program.add_command(
        "info", _info, help="show an architecture: its tensors, parameters, FLOPs and bytes"
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="PRESET|DIR",
        help="name of a preset, a directory with a config.json, or a name on the Hub; without it, presets "
        "are listed",
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="B", help="sequences in a batch"
    )
    parser.add_argument(
        "--seq",
        type=positive,
        metavar="S",
        help="tokens in a sequence; default: the smaller of max_position_embeddings and 8192",
    )


def _info(options: argparse.Namespace) -> None:
    from llama_jax import PRESETS, LlamaConfig
    from llama_jax.files.hub import hub_name
    from llama_jax.files.paths import local_path
    from llama_jax.files.remote import remote_path
    from llama_jax.inspection.architecture import show

    if options.model is None:
        print("\n".join(PRESETS))
        return
    if options.model in PRESETS:
        config = PRESETS[options.model]
    elif (
        local_path(options.model).is_dir() or hub_name(options.model) or remote_path(options.model)
    ):
        config = LlamaConfig.from_pretrained(options.model)
    else:
        raise ValueError(
            f"{options.model}: neither a directory nor a preset, expected one of "
            f"{', '.join(PRESETS)}"
        )
    seq = options.seq or min(config.max_position_embeddings, 8192)
    show(options.model, config, batch=options.batch, seq=seq)


if __name__ == "__main__":
    leave(main(), at_once=True)
