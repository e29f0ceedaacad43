"""The command line: `python -m train COMMAND`. A command is a function here; tyro reads its signature."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from train.config import RunOptions
from train.documents import source_files
from train.tokenize import tokenize as run_tokenize

_CONSOLE = Console(stderr=True, soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's fault, 130 interrupted.

    A run that SIGTERM or a first SIGINT stops has saved and is not interrupted: 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _with_saved_flags(arguments)
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m train", args=arguments)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        _CONSOLE.print(f"[bold red]error:[/] {escape(message)}")
        return 2
    except KeyboardInterrupt:
        # a run begun is gone on with by another command, which it says when it stops
        again = "" if arguments[:1] == ["run"] else ": the same command goes on from here"
        _CONSOLE.print(f"interrupted{again}")
        return 130
    return 0


def _with_saved_flags(arguments: list[str]) -> list[str]:
    """Flags from a file put before those given: `run --toml FILE`, `resume RUN`'s own run.toml."""
    from train.config import FILE, flags_of

    if arguments[:1] == ["run"] and "--toml" in arguments:
        place = arguments.index("--toml")
        if place + 1 == len(arguments):
            raise ValueError("--toml: found nothing, expected a file")
        file = Path(arguments[place + 1])
        return ["run", *flags_of(file), *arguments[1:place], *arguments[place + 2 :]]
    if arguments[:1] == ["resume"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        folder = Path(arguments[1])
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder}: found no {FILE}, expected the folder of a run")
        return ["resume", str(folder), *flags_of(folder / FILE), *arguments[2:]]
    return arguments


def run(options: Annotated[RunOptions, tyro.conf.arg(name="")]) -> None:
    """Pretrain. Flags can also come from a file, `--toml FILE`; a run's folder has one, run.toml."""
    from train import run as train_run

    train_run.run(options)


def resume(
    folder: Annotated[Path, tyro.conf.Positional],
    /,
    options: Annotated[RunOptions, tyro.conf.arg(name="")],
) -> None:
    """Go on with the run in a folder; flags change where and how it computes, not what.

    Args:
        folder: of the run
    """
    from train import run as train_run
    from train.config import FILE, flags_of

    saved = tyro.cli(RunOptions, args=flags_of(folder / FILE))
    train_run.resume(folder, saved, options)


def tokenize(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SRC...")],
    /,
    tokenizer: Path,
    out: Path,
    text_field: str = "text",
    validation_fraction: float = 0.005,
    shard_tokens: int = 1 << 25,
    eos: str | None = None,
) -> None:
    """Turn text into the token files that training reads; interrupted, the same command goes on.

    Args:
        sources: files, directories or globs of text, .jsonl or .parquet, compressed (.gz, .zst) or not
        tokenizer: a tokenizer.json, or the directory that has one
        out: the directory to write
        text_field: the field of JSON lines, the column of Parquet
        validation_fraction: how much of the documents is kept from training
        shard_tokens: tokens of a shard, which is held in memory
        eos: the end-of-text token, if not the one that the files beside the tokenizer name
    """
    total = sum(file.stat().st_size for source in sources for file in source_files(source))
    speed = TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s")
    columns = (BarColumn(), DownloadColumn(), speed, TimeRemainingColumn())
    begun = time.monotonic()
    with Progress(*columns, console=_CONSOLE) as progress:
        bar = progress.add_task("tokenizing", total=total, tokens=0, rate=0)

        def report(read: int, tokens: int) -> None:
            rate = tokens / (time.monotonic() - begun)
            progress.update(bar, completed=read, tokens=tokens, rate=rate)

        index = run_tokenize(
            sources,
            tokenizer,
            out,
            text_field=text_field,
            validation_fraction=validation_fraction,
            shard_tokens=shard_tokens,
            eos=eos,
            report=report,
        )
    for split, shards in index.splits.items():
        documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
        _CONSOLE.print(f"{split}: {tokens:,} tokens of {documents:,} documents")
    _CONSOLE.print(f"written: {escape(str(out))}")


# name on the command line: the function
COMMANDS: dict[str, Callable[..., Any]] = {"run": run, "resume": resume, "tokenize": tokenize}


if __name__ == "__main__":
    sys.exit(main())
