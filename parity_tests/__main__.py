"""`python -m parity_tests report|mutate`: the proof as a tool for any Llama checkpoint."""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
from pathlib import Path

from llama_jax.cli.arguments import OneLineParser
from llama_jax.cli.program import leave, run_program
from llama_jax.formatting import console, printable


def main(arguments: list[str] | None = None) -> int:
    """Run one command: 0 the tolerance holds, 1 it does not, 2 the user's mistake, in one line."""

    def command() -> int:
        options = _parser().parse_args(arguments)
        return options.command(options)

    return run_program(command, extra="parity")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m parity_tests", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report", help="llama_jax beside PyTorch, both against a float64 oracle, module by module"
    )
    report.set_defaults(command=_report)
    report.add_argument("directory", type=Path, metavar="HF_DIR")
    report.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="token ids, .npy or integers; default: 2000 tokens of a bundled text",
    )
    report.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of both programs"
    )
    report.add_argument("--backward", action="store_true", help="every parameter's gradient too")
    report.add_argument("--json", type=Path, metavar="FILE", help="every number")
    report.add_argument("--html", type=Path, metavar="FILE", help="one page with pictures")
    report.add_argument(
        "--against", type=Path, metavar="DIR", help="this checkpoint in place of PyTorch's program"
    )

    mutate = commands.add_parser(
        "mutate",
        help="the report under every deliberate mistake: what caught it, where it was found",
    )
    mutate.set_defaults(command=_mutate)
    return parser


def _report(options: argparse.Namespace) -> int:
    for path in (options.json, options.html):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: its directory is not there, expected one that is")

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
