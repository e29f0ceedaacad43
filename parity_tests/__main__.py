"""`python -m parity_tests`: compare checkpoints, recordings and training runs of Llama with references."""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.cli.arguments import Parser, number, program_parser
from llama_jax.cli.program import leave, run_program
from llama_jax.formatting import console, printable

if TYPE_CHECKING:
    from rich.console import Console


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 within tolerance, 1 not, 2 an error in one line."""

    def command() -> int:
        options = _parser().parse_args(arguments)
        return options.command(options)

    return run_program(command, extra="parity")


def _parser() -> Parser:
    parser = program_parser(
        "python -m parity_tests",
        "Check checkpoints, other programs and training runs of Llama, module by module or step by step.",
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
    _add_record(parser)
    _add_check(parser)
    parser.add_command(
        "mutate",
        _mutate,
        help="run the report under each deliberate mistake and show which module it names",
    )
    _add_trajectory(parser)
    return parser


def _add_record(parser: Parser) -> None:
    record = parser.add_command(
        "record",
        _record,
        help="record what a checkpoint computes in PyTorch or llama_jax, to be checked elsewhere",
    )
    record.add_argument(
        "directory",
        type=Path,
        metavar="HF_DIR",
        help="Hugging Face checkpoint, or its name on the Hub",
    )
    record.add_argument("--out", type=Path, required=True, metavar="TRACE", help="folder to write")
    record.add_argument(
        "--program",
        choices=("transformers", "llama_jax"),
        default="transformers",
        help="what computes; default: transformers",
    )
    record.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="token ids to run, .npy or integers in text; default: tokens of a bundled text",
    )
    record.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens at most; default: 512"
    )
    record.add_argument(
        "--dtype", choices=tuple(_DTYPES), default="fp32", help="dtype of the weights"
    )
    record.add_argument(
        "--autocast",
        choices=("bf16", "fp16"),
        help="run transformers under autocast",
    )
    record.add_argument(
        "--attention",
        choices=("sdpa", "eager"),
        help="attention of transformers; default: sdpa",
    )
    record.add_argument("--forward-only", action="store_true", help="leave out gradients")


def _add_check(parser: Parser) -> None:
    check = parser.add_command(
        "check",
        _check,
        help="say whether a recorded program is the same function, and where it departs first",
    )
    check.add_argument("trace", type=Path, metavar="TRACE", help="folder that was recorded")
    check.add_argument(
        "other",
        type=Path,
        nargs="?",
        metavar="TRACE2",
        help="a second recording, to compare the first with in place of --model",
    )
    check.add_argument(
        "--model", type=Path, metavar="HF_DIR", help="the Hugging Face checkpoint that TRACE is of"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    check.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _record(options: argparse.Namespace) -> int:
    if options.length < 2:
        raise ValueError(f"--length: found {options.length}, expected at least 2")
    if options.program == "llama_jax":
        for name in ("autocast", "attention"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name}: only for --program transformers")

    from parity_tests.traces.record_checkpoint import record_checkpoint

    record_checkpoint(
        options.directory,
        options.out,
        program=options.program,
        tokens=options.tokens,
        length=options.length,
        dtype=_DTYPES[options.dtype],
        attention=options.attention or "sdpa",
        autocast=options.autocast and _DTYPES[options.autocast],
        backward=not options.forward_only,
    )
    return 0


def _check(options: argparse.Namespace) -> int:
    if (options.model is None) == (options.other is None):
        raise ValueError("give --model HF_DIR or a second trace")
    if options.other is not None and options.html is not None:
        raise ValueError("--html: only for a check with --model")
    _require_writable(options.json, options.html)

    from llama_jax.files.paths import source_path
    from parity_tests.report.output.files import write_html, write_json
    from parity_tests.traces import output
    from parity_tests.traces.check import check
    from parity_tests.traces.compare import compare
    from parity_tests.traces.progress import section_progress

    out = console()
    if options.other is not None:
        differences = compare(options.trace, options.other)
        output.show_differences(differences, out)
        if options.json is not None:
            write_json(output.differences_to_json(differences), options.json)
            _say_written(options.json, out)
        return 0 if differences.holds else 1
    with section_progress(console(stderr=True)) as start:
        verdict = check(options.trace, source_path(options.model), start=start)
    output.show(verdict, out)
    if options.json is not None:
        write_json(output.to_json(verdict), options.json)
        _say_written(options.json, out)
    if options.html is not None:
        write_html(output.page(verdict), options.html)
        _say_written(options.html, out)
    return 0 if verdict.holds else 1


def _require_writable(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path.parent}: directory does not exist")
        if path is not None and path.is_dir():
            raise ValueError(f"{path}: is a directory, expected a file")


def _say_written(path: Path, out: "Console") -> None:
    out.print(f"wrote {printable(str(path))}", soft_wrap=True)


def _report(options: argparse.Namespace) -> int:
    _require_writable(options.json, options.html)

    from parity_tests.report.output.files import write_html, write_json
    from parity_tests.report.output.page import page
    from parity_tests.report.output.tables import show, to_json
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
    if options.json is not None:
        write_json(to_json(made), options.json)
        _say_written(options.json, out)
    if options.html is not None:
        write_html(page(made), options.html)
        _say_written(options.html, out)
    return 0 if made.holds else 1


def _add_trajectory(program: Parser) -> None:
    parser = program.add_command(
        "trajectory",
        _trajectory,
        help="compare the metrics of two training runs: where they part, and whether it is rounding",
    )
    parser.add_argument(
        "logs",
        nargs=2,
        type=Path,
        metavar="LOG",
        help="a run's folder, metrics.jsonl (also of resume_torch.py), MaxText's metrics_file, "
        "trainer_state.json, CSV, an event file of TensorBoard, or lines that a program printed",
    )
    parser.add_argument(
        "--rounding",
        nargs=2,
        type=Path,
        metavar="LOG",
        help="logs of two runs that differ in rounding alone, such as one with other --micro-batches; one "
        "of them may be among the logs compared",
    )
    parser.add_argument(
        "--factor",
        type=number,
        default=30.0,
        metavar="X",
        help="how many times the difference of those two is taken for rounding (default: 30)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the differences over steps, as PNG"
    )


def _trajectory(options: argparse.Namespace) -> int:
    _require_writable(options.json, options.picture)
    if not options.factor >= 1:
        raise ValueError(f"factor: found {options.factor}, expected at least 1")

    from parity_tests.report.output.files import write_json
    from parity_tests.trajectory.compare import compare
    from parity_tests.trajectory.logs import read_log
    from parity_tests.trajectory.output import show, to_json, write_picture

    a, b = map(read_log, options.logs)
    rounding = None
    if options.rounding is not None:
        c, d = map(read_log, options.rounding)
        rounding = c, d
    made, out = compare(a, b, rounding, options.factor), console()
    show(made, out)
    if options.json is not None:
        write_json(to_json(made), options.json)
        _say_written(options.json, out)
    if options.picture is not None:
        write_picture(made, options.picture)
        _say_written(options.picture, out)
    return 0 if made.departs is None else 1


def _mutate(options: argparse.Namespace) -> int:
    from parity_tests.report.mutate import mutate_all

    return 0 if mutate_all(console()) else 1


if __name__ == "__main__":
    leave(main())
