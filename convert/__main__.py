"""The command line: `python -m convert SRC DST` and `python -m convert info SRC`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from convert import Plan, info, plan, run
from convert.checkpoint import DTYPES
from llama_jax.arguments import OneLineParser, size_argument

_EPILOG = """\
python -m convert info SRC [--json]   says what is in a checkpoint and writes nothing

SRC is a GGUF file of the llama architecture, quantised or not; of one in pieces, any piece.
DST becomes a Hugging Face directory: config.json, safetensors, tokenizer, generation config.
It must not exist; it appears when it is complete, and not at all if anything fails.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's fault, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = _info if arguments[:1] == ["info"] else _convert
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        command(arguments, console)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        console.print(f"[bold red]error:[/] {escape(message)}")
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: nothing was written")
        return 130
    return 0


def _convert(arguments: Sequence[str], console: Console) -> None:
    parser = OneLineParser(
        prog="python -m convert",
        description="Convert a checkpoint, one tensor in memory at a time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="the checkpoint to read")
    parser.add_argument("destination", metavar="DST", help="the directory to make")
    parser.add_argument("--to", choices=["hf"], default="hf", help="format of DST: Hugging Face")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of every tensor written; default: the file's own, float32 if it is quantised",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size_argument,
        default="5GB",
        metavar="SIZE",
        help="largest safetensors file, as in 500MB, 5GB, 2GiB; default: %(default)s",
    )
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="leave the tokenizer behind, and faults in it"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the cost, write nothing"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)

    todo = plan(
        options.source,
        options.destination,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        tokenizer=not options.no_tokenizer,
    )
    _print_plan(todo, console)
    if options.dry_run:
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("writing", total=todo.bytes_to_write)
        run(todo, lambda count: progress.advance(task, count))
    console.print(f"written: {escape(str(todo.destination))}")


def _info(arguments: Sequence[str], console: Console) -> None:
    parser = OneLineParser(
        prog="python -m convert info", description="Say what is in a checkpoint."
    )
    parser.add_argument("command", choices=["info"], help=argparse.SUPPRESS)
    parser.add_argument("source", metavar="SRC", help="the checkpoint to read")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(arguments)
    facts = info(options.source)
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if key == "config":
            continue
        table.add_row(f"[bold]{key}[/]", escape(_readable(value)))
    for key, value in facts["config"].items():
        table.add_row(f"config.{key}", escape(_readable(value)))
    Console().print(table)


def _print_plan(todo: Plan, console: Console) -> None:
    checkpoint = todo.checkpoint
    stored = ", ".join(checkpoint.facts.get("stored", {}))
    console.print(
        f"{checkpoint.format} ({stored}), {checkpoint.parameters:,} parameters "
        f"in {len(checkpoint.tensors)} tensors"
    )
    console.print(
        f"writes {_bytes(todo.bytes_to_write)} of {todo.dtype}, "
        f"holds at most {_bytes(todo.peak_memory)} of tensors in memory"
    )
    for note in checkpoint.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")


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


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """Turn SIGTERM into the interrupt that cleans up."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
