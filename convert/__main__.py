"""`python -m convert SRC DST`, `python -m convert info SRC` and `python -m convert diff A B`."""

from __future__ import annotations

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from convert.formats.registry import FORMATS, writable
from llama_jax.cli.arguments import Parser, program_parser, size_argument
from llama_jax.cli.program import leave, run_program
from llama_jax.formatting import console, printable, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from convert import Plan, Report

_WIDTH = 2 + max(len(entry.title) for entry in FORMATS.values())
_LAYOUTS = "\n".join(f"  {entry.title:<{_WIDTH}}{entry.layout}" for entry in FORMATS.values())
_SOURCE = "checkpoint to read: a path, a URL such as s3://bucket/model, or a name on the Hub"
_EPILOG = f"""\
python -m convert info SRC shows what is in a checkpoint and writes nothing; python -m convert diff A B \
compares two.

The format of SRC is detected:
{_LAYOUTS}

DST must not exist. It is a directory, or for GGUF a file, and appears only when it is complete and \
verified. conversion.json, written with it, holds the SHA-256 of every tensor; converting DST checks them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 if `info` lists problems or `diff` differences, 2 for
    an error, 130 after an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    chosen = arguments[0] if arguments[:1] in (["info"], ["diff"]) else None

    def command() -> int:
        if chosen is None:
            return _convert(parser.parse_args(arguments))
        options = parser.commands[chosen].parse_args(arguments[1:])
        return _info(options) if chosen == "info" else _diff(options)

    return run_program(command, interrupted="interrupted: nothing was written", extra="convert")


def _parser() -> Parser:
    """The parser of a conversion; those of `info` and `diff` are its `commands`."""
    parser = program_parser(
        "python -m convert",
        "Convert a checkpoint into another format, one tensor in memory at a time.",
        epilog=_EPILOG,
    )
    parser.add_argument("source", metavar="SRC", help=_SOURCE)
    parser.add_argument("destination", metavar="DST", help="directory or file to write, or its URL")
    parser.add_argument(
        "--to",
        choices=writable(),
        help="format of DST; default: gguf if DST ends in .gguf, else hf",
    )
    parser.add_argument(
        "--dtype",
        type=_dtype_name,
        choices=list(dict.fromkeys(dtype for entry in FORMATS.values() for dtype in entry.choices)),
        help="dtype to write; default: the source's dtype, or float32 if it is quantized. F32, BF16, F16 "
        "and Q8_0 are accepted as well; q8_0 is for GGUF only, which keeps vectors in float32; fp8 is for "
        "hf: the projections as compressed-tensors' FP8, which vLLM loads",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size_argument,
        metavar="SIZE",
        help="largest safetensors file, as in 500MB, 5GB, 2GiB; default: 5GB",
    )
    parser.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="do not convert the tokenizer (and ignore errors in it)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the cost, write nothing"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="default: read DST back and compare every tensor bit for bit; --verify: also compare logits "
        "with PyTorch on real tokens; --no-verify: compare nothing",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="merge this LoRA adapter of PEFT (a directory or a name on the Hub), rounding once",
    )
    _add_tree_options(parser)
    parser.add_argument(
        "--scan-layers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="for --to maxtext: whether layers are stacked, as its setting of that name; default: yes",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload DST to this repository on the Hub; a new one is private",
    )
    parser.add_argument(
        "--average",
        metavar="CHECKPOINT",
        nargs="+",
        default=[],
        help="write the mean of SRC and these checkpoints of the same model, of any formats",
    )
    parser.add_argument(
        "--weights",
        metavar="W",
        type=float,
        nargs="+",
        help="of SRC and the checkpoints of --average, in this order; default: all alike",
    )
    parser.add_argument(
        "--layers", metavar="0-15", help="keep these layers only, as in 0-15 or 0-3,8,12-15"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="add rows to the embedding and the head, or cut some",
    )
    parser.add_argument(
        "--new-rows",
        choices=("mean", "zero"),
        default="mean",
        help="what rows added by --vocab-size are; default: the mean of the others",
    )
    parser.add_argument(
        "--cast-only",
        metavar="REGEX",
        help="cast only tensors whose names have this to --dtype; the others are left as they are",
    )
    parser.add_argument(
        "--rename",
        metavar="FILE",
        help="rename the tensors of SRC first: a JSON file of regular expressions and replacements",
    )
    parser.add_argument(
        "--to-shards",
        type=int,
        metavar="N",
        help="write so many safetensors files, in place of --max-shard-size",
    )
    info = Parser(
        prog="python -m convert info",
        description="Show what is in a checkpoint, and list any problems. The exit code is 0 without "
        "problems, 1 with problems, 2 if this is no checkpoint.",
    )
    info.add_argument("source", metavar="SRC", help=_SOURCE)
    _add_tree_options(info)
    info.add_argument("--json", action="store_true", help="print a JSON object")
    parser.commands["info"] = info
    diff = Parser(
        prog="python -m convert diff",
        description="Compare two checkpoints of any formats: which tensors differ, by how much, and if "
        "a cast, a permutation, a transpose, a scale or a change of low rank explains it. The exit code is "
        "0 if all are the same bit for bit, 1 if not, 2 if one is no checkpoint.",
    )
    diff.add_argument("one", metavar="A", help=_SOURCE)
    diff.add_argument("other", metavar="B", help="the checkpoint to compare with it")
    diff.add_argument("--json", action="store_true", help="print a JSON object")
    parser.commands["diff"] = diff
    return parser


def _add_tree_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--map",
        metavar="FILE",
        help="SRC is an Orbax checkpoint of another program, whose names this TOML file maps to Hugging "
        "Face's (see docs/conversion.md)",
    )
    parser.add_argument(
        "--rope",
        choices=("halves", "pairs"),
        help="order of the rows of queries and keys in MaxText's or another program's Orbax checkpoint, "
        "where it is not known: as Hugging Face has them, or interleaved as Meta has them",
    )


def _dtype_name(text: str) -> str:
    from convert.checkpoint import dtype_name

    return dtype_name(text)


def _convert(options: argparse.Namespace) -> int:
    from llama_jax.files.buffers import kept_heap

    with kept_heap():
        return _plan_and_run(options)


def _plan_and_run(options: argparse.Namespace) -> int:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from convert import Surgery, plan, run
    from llama_jax.files.hub import push, require_pushable
    from llama_jax.files.remote import is_remote, remote_path

    if options.push is not None:
        require_pushable(options.push)
        if remote_path(options.destination) is not None:
            raise ValueError(
                "push: DST must be a local directory; push to the Hub, or write to a URL"
            )
    say = console(stderr=True, soft_wrap=True)
    todo = plan(
        options.source,
        options.destination,
        to=options.to,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        tokenizer=not options.no_tokenizer,
        verify=options.verify is not False,
        logits=bool(options.verify),
        adapter=options.adapter,
        name_map=options.map,
        rope=options.rope,
        scan_layers=options.scan_layers,
        surgery=Surgery(
            average=options.average,
            weights=options.weights,
            layers=options.layers,
            vocab_size=options.vocab_size,
            new_rows=options.new_rows,
            cast_only=options.cast_only,
        ),
        shards=options.to_shards,
        rename=options.rename,
    )
    _print_plan(todo, say)
    if options.dry_run:
        return 0
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with progress_bar("{task.description}", *columns, console=say) as progress:
        compared = sum(spec.nbytes for spec in todo.specs) if todo.verify else 0
        total = todo.bytes_to_write + compared
        if is_remote(todo.destination):
            total *= 2
        task = progress.add_task("writing, then comparing", total=total)
        report = run(todo, lambda count: progress.advance(task, count))
    _print_report(report, say)
    if todo.rounding is not None and todo.rounding.error:
        say.print(
            f"rounding the merged weights to {todo.dtype or 'their dtypes'} changed them by "
            f"{todo.rounding.relative:.1%} of what the adapter adds (rms)"
        )
    if options.push is not None:
        address = push(
            report.destination, options.push, message=f"Converted from {todo.checkpoint.format}"
        )
        say.print(f"pushed: {printable(address)}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from convert import info

    facts = info(options.source, name_map=options.map, rope=options.rope)
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


def _diff(options: argparse.Namespace) -> int:
    from rich.table import Table

    from convert.diff import as_json, diff

    comparison = diff(options.one, options.other)
    differs = bool(comparison.config or comparison.differences)
    if options.json:
        print(json.dumps(as_json(comparison), indent=2))
        return int(differs)
    out = console()
    for field in comparison.config:
        out.print(f"config: {field}")
    if comparison.differences:
        table = Table(box=None)
        for title in ("tensor", "explained by", "largest", "relative"):
            table.add_column(title, overflow="fold")
        for each in comparison.differences:
            numbers = ("" if n is None else f"{n:.3g}" for n in (each.largest, each.relative))
            table.add_row(each.name, each.kind, *numbers)
        out.print(table)
    out.print(f"{comparison.same} tensors are the same, {len(comparison.differences)} differ")
    return int(differs)


def _print_plan(todo: Plan, say: Console) -> None:
    from rich.text import Text

    from llama_jax.files.memory import available_memory

    checkpoint = todo.checkpoint
    stored = ", ".join(checkpoint.facts.get("stored", {}))
    say.print(
        f"{checkpoint.format} ({stored}), {checkpoint.parameters:,} parameters "
        f"in {len(checkpoint.tensors)} tensors"
    )
    memory, available = todo.peak_memory, available_memory()
    say.print(
        f"to {FORMATS[todo.to].title}, {todo.dtype or 'dtypes as stored'}: "
        f"{_bytes(todo.bytes_to_write)} of disk, at most {_bytes(memory)} of memory, "
        f"about {max(1, round(todo.seconds))} s"
    )
    notes = todo.notes
    if available is not None and available < memory:
        notes.append(f"only {_bytes(available)} of memory are free, which may not be enough")
    for note in notes:
        say.print(Text.assemble(("note:", "yellow"), f" {printable(note)}"))


def _print_report(report: Report, say: Console) -> None:
    from convert.casting import Changes

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
