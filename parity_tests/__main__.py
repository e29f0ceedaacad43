"""`python -m parity_tests report|mutate`: check a Llama checkpoint against PyTorch, module by module."""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
from pathlib import Path

from llama_jax.cli.arguments import Parser, program_parser
from llama_jax.cli.program import leave, run_program
from llama_jax.formatting import console, printable


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 within tolerance, 1 not, 2 an error in one line."""

    def command() -> int:
        options = _parser().parse_args(arguments)
        return options.command(options)

    return run_program(command, extra="parity")


def _parser() -> Parser:
    parser = program_parser(
        "python -m parity_tests", "Check a Llama checkpoint against PyTorch, module by module."
    )
    report = parser.add_command(
        "report",
        _report,
        help="compare a checkpoint in llama_jax and in PyTorch with a float64 reference",
    )
    report.add_argument(
        "directory",
        type=Path,
        metavar="HF_DIR",
        help="Hugging Face checkpoint, or its name on the Hub",
    )
    report.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="token ids to run, .npy or integers in text; default: 2000 tokens of a bundled text",
    )
    report.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of both programs"
    )
    report.add_argument(
        "--backward", action="store_true", help="also compare the gradient of every parameter"
    )
    report.add_argument(
        "--json", type=Path, metavar="FILE", help="write every number of the report"
    )
    report.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report as a page with pictures"
    )
    report.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="compare with this checkpoint in llama_jax, instead of with PyTorch",
    )
    parser.add_command(
        "mutate",
        _mutate,
        help="run the report under each deliberate mistake and show which module it names",
    )
    return parser


def _report(options: argparse.Namespace) -> int:
    for path in (options.json, options.html):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path.parent}: directory does not exist")
        if path is not None and path.is_dir():
            raise ValueError(f"{path}: is a directory, expected a file")

    from parity_tests.report.output.files import write_html, write_json
    from parity_tests.report.output.tables import show
    from parity_tests.report.run import report

    out = console()
    made = report(
        options.directory,
        against=options.against,
        tokens=options.tokens,
        dtype=options.dtype,
        with_backward=options.backward,
        console=console(stderr=True),
    )
    show(made, out)
    for path, write in ((options.json, write_json), (options.html, write_html)):
        if path is not None:
            write(made, path)
            out.print(f"wrote {printable(str(path))}", soft_wrap=True)
    return 0 if made.holds else 1


def _mutate(options: argparse.Namespace) -> int:
    from parity_tests.report.mutate import mutate_all

    return 0 if mutate_all(console()) else 1


if __name__ == "__main__":
    leave(main())
