"""The command line: `python -m convert SRC DST` and `python -m convert info SRC`."""

from __future__ import annotations

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from convert import Plan, Report, info, plan, run
from convert.casting import Changes
from convert.checkpoint import dtype_name
from convert.estimate import available_memory
from convert.formats.registry import FORMATS
from llama_jax.cli.arguments import OneLineParser, size_argument
from llama_jax.cli.program import leave, run_program
from llama_jax.formatting import console, printable

_EPILOG = """\
python -m convert info SRC [--json]   says what is in a checkpoint and writes nothing; exit code 1 if it
                                      has faults

SRC is recognised by what it holds:
  Hugging Face  a directory with *.safetensors or pytorch_model*.bin
  Orbax         a run of python -m train, one of its checkpoints/STEP, or a directory made with --to orbax
  GGUF          a file of the llama architecture, quantised or not; of one in pieces, any piece
  Meta          a directory with params.json and consolidated.*.pth
DST is made: a directory, or for GGUF a file. It must not exist; it appears when it is complete and
proved, and not at all if anything fails. With it comes conversion.json, the SHA-256 of every tensor;
a source that has one is checked against it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 `info` lists faults, 2 the user's fault, 130
    interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = _info if arguments[:1] == ["info"] else _convert
    say = console(stderr=True, soft_wrap=True)
    return run_program(
        lambda: command(arguments, say), interrupted="interrupted: nothing was written"
    )


def _convert(arguments: Sequence[str], say: Console) -> int:
    parser = OneLineParser(
        prog="python -m convert",
        description="Convert a checkpoint, one tensor in memory at a time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="the checkpoint to read")
    parser.add_argument("destination", metavar="DST", help="the directory or file to make")
    parser.add_argument(
        "--to",
        choices=list(FORMATS),
        help="format of DST; default: gguf where DST ends in .gguf, else hf",
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=list(dict.fromkeys(d for f in FORMATS.values() for d in f.DTYPE_NAMES)),
        help="of the tensors written; default: the source's own, float32 if it is quantised. "
        "F32, BF16, F16 and Q8_0 are understood as well. GGUF keeps vectors in float32, as llama.cpp wants "
        "them; q8_0 is for GGUF alone",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size_argument,
        metavar="SIZE",
        help="largest safetensors file, as in 500MB, 5GB, 2GiB; default: 5GB",
    )
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="leave the tokenizer behind, and faults in it"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the cost, write nothing"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="default: read DST back and compare every tensor, bit for bit. --verify also compares logits "
        "with PyTorch's on real tokens; --no-verify compares nothing",
    )
    options = parser.parse_args(arguments)

    todo = plan(
        options.source,
        options.destination,
        to=options.to,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        tokenizer=not options.no_tokenizer,
        verify=options.verify is not False,
        logits=bool(options.verify),
    )
    _print_plan(todo, say)
    if options.dry_run:
        return 0
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=say) as progress:
        compared = sum(spec.nbytes for spec in todo.specs) if todo.verify else 0
        total = todo.bytes_to_write + compared
        task = progress.add_task("writing, then comparing", total=total)
        report = run(todo, lambda count: progress.advance(task, count))
    _print_report(report, say)
    return 0


def _info(arguments: Sequence[str], say: Console) -> int:
    parser = OneLineParser(
        prog="python -m convert info",
        description="Say what is in a checkpoint. Exit code: 0 sound, 1 with faults, which are listed, "
        "2 no checkpoint.",
    )
    parser.add_argument("command", choices=["info"], help=argparse.SUPPRESS)
    parser.add_argument("source", metavar="SRC", help="the checkpoint to read")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(arguments)
    facts = info(options.source)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 1 if facts["problems"] else 0
    table = Table(show_header=False, box=None)
    for _ in range(2):
        table.add_column(overflow="fold")
    for key, value in facts.items():
        if key == "config" or (key == "problems" and not value):
            continue
        table.add_row(Text(key, style="bold"), _readable(value))
    for key, value in facts["config"].items():
        table.add_row(f"config.{key}", _readable(value))
    console().print(table)
    return 1 if facts["problems"] else 0


def _print_plan(todo: Plan, say: Console) -> None:
    checkpoint = todo.checkpoint
    stored = ", ".join(checkpoint.facts.get("stored", {}))
    say.print(
        f"{checkpoint.format} ({stored}), {checkpoint.parameters:,} parameters "
        f"in {len(checkpoint.tensors)} tensors"
    )
    memory, available = todo.peak_memory, available_memory()
    say.print(
        f"to {FORMATS[todo.to].TITLE}, {todo.dtype or 'dtypes as they are'}: "
        f"{_bytes(todo.bytes_to_write)} of disk, at most {_bytes(memory)} of memory, "
        f"about {max(1, round(todo.seconds))} s"
    )
    notes = todo.notes
    if available is not None and available < memory:
        notes.append(f"{_bytes(available)} of memory are free: it may not be enough")
    for note in notes:
        say.print(Text.assemble(("note:", "yellow"), f" {printable(note)}"))


def _print_report(report: Report, say: Console) -> None:
    if report.changed:
        total = Changes(*map(sum, zip(*report.changed.values(), strict=True)))
        say.print(
            f"{total.rounded:,} values in {len(report.changed)} of {report.tensors} tensors were rounded: "
            f"{total.to_zero:,} became zero, {total.subnormal:,} subnormal"
        )
    if report.verified:
        say.print(f"read back and compared: {report.tensors} tensors, bit for bit")
    if report.logits:
        tokens, ours, torch = report.logits
        say.print(
            f"logits of {tokens} tokens against float64: error {ours:.2e}, PyTorch's {torch:.2e}, "
            f"a ratio of {ours / torch:.2f}"
        )
    say.print(f"written: {printable(str(report.destination))}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_readable(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    return f"{value:,}" if type(value) is int else str(value)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


if __name__ == "__main__":
    leave(main())
