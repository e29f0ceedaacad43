"""The command line: `python -m train COMMAND`. A command is a function here; tyro reads its signature."""

from llama_jax.cli.startup import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from llama_jax.cli.program import leave, run_program
from llama_jax.formatting import console, printable
from train.data.documents import source_files
from train.data.tokenize import tokenize as run_tokenize
from train.flags import parse_flags
from train.option_checks import require_counts
from train.options import FILE, PLANNED, Dtype, RunOptions
from train.options_toml import flags_of

_CONSOLE = console(stderr=True, soft_wrap=True)

Command = Callable[[], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's fault, 130 interrupted.

    A run that SIGTERM or a first SIGINT stops has saved and is not interrupted: 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Orbax explains its defaults through it
    logging.getLogger("absl").setLevel(logging.ERROR)
    # a run begun is gone on with by `resume`, as it says when it stops
    goes_on = arguments[:1] in (["tokenize"], ["resume"])
    return run_program(
        lambda: _parsed(_with_saved_flags(arguments))(),
        interrupted="interrupted" + ": the same command goes on from here" * goes_on,
    )


def _parsed(arguments: list[str]) -> Command:
    """The command that the arguments ask for, with its options. Raises ValueError."""

    def later(function: Callable[..., None]) -> Callable[..., Command]:
        return wraps(function)(lambda *args, **options: partial(function, *args, **options))

    commands = {name: later(function) for name, function in COMMANDS.items()}
    return parse_flags(
        lambda: tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m train", args=arguments
        )
    )


def _with_saved_flags(arguments: list[str]) -> list[str]:
    """Flags from a file put before those given: `run` and `plan --toml FILE`, `resume RUN`'s run.toml."""
    if arguments[:1] in (["run"], ["plan"]) and "--toml" in arguments:
        place = arguments.index("--toml")
        if place + 1 == len(arguments):
            raise ValueError("--toml: found nothing, expected a file")
        file = Path(arguments[place + 1])
        return [arguments[0], *flags_of(file), *arguments[1:place], *arguments[place + 2 :]]
    if arguments[:1] == ["resume"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        folder = Path(arguments[1])
        _require_run(folder)
        return ["resume", str(folder), *flags_of(folder / FILE), *arguments[2:]]
    return arguments


def run(options: Annotated[RunOptions, tyro.conf.arg(name="")]) -> None:
    """Pretrain. Flags can also come from a file, `--toml FILE`; a run's folder has one, run.toml."""
    from train.run.begin import begin

    begin(options)


def resume(
    folder: Annotated[Path, tyro.conf.Positional],
    /,
    options: Annotated[RunOptions, tyro.conf.arg(name="")],
) -> None:
    """Resume a run. Of its options only those that do not change the result may be overridden, and steps.

    Args:
        folder: of the run
    """
    from train.run import resume as run_resume

    run_resume.resume(folder, _saved_options(folder), options)


def export(
    folder: Annotated[Path, tyro.conf.Positional],
    directory: Annotated[Path, tyro.conf.Positional],
    /,
    step: int | None = None,
    dtype: Dtype | None = None,
    verify: bool = False,
) -> None:
    """Write a run's model as a Hugging Face directory, tokenizer included.

    Args:
        folder: of the run
        directory: to write
        step: of the checkpoint; default: the newest
        dtype: of the weights; default: the parameters'
        verify: have transformers load it whole, and PyTorch compute the loss the run reported
    """
    from train.model.export import export_run, verify_export

    options = _saved_options(folder)
    exported = export_run(folder, options, directory, step=step, dtype=dtype)
    _CONSOLE.print(f"written: {printable(str(directory))}, step {exported}")
    if verify:
        found = verify_export(folder, options, directory, step=exported, dtype=dtype)
        reported = "none at that step" if found.reported is None else f"{found.reported:.6f}"
        _CONSOLE.print(
            f"validation loss over {found.num_tokens:,} tokens: PyTorch {found.torch:.6f}, here "
            f"{found.ours:.6f}, reported by the run {reported}"
        )


def evaluate(
    target: Annotated[Path, tyro.conf.Positional],
    /,
    data: tuple[str, ...] = (),
    batches: int = 0,
    batch_size: int = 8,
    sequence_length: int | None = None,
    step: int | None = None,
    dtype: Dtype = "float32",
) -> None:
    """Loss and perplexity of a run or a Hugging Face directory over validation tokens.

    Args:
        target: the folder of a run, or a Hugging Face directory
        data: token directories; default: the run's
        batches: how many; 0: all
        batch_size: rows of a batch
        sequence_length: tokens of a row; default: the run's, or the model's up to 2048
        step: of the run's checkpoint; default: the newest
        dtype: of parameters and computation
    """
    from train.model.evaluate import evaluate_target

    found = evaluate_target(
        target,
        data,
        _saved_options(target) if (target / FILE).is_file() else None,
        limit=batches,
        batch_size=batch_size,
        sequence_length=sequence_length,
        step=step,
        dtype=dtype,
    )
    print(f"loss {found.loss:.6f}  perplexity {found.perplexity:.4f}  tokens {found.num_tokens:,}")


def _saved_options(folder: Path) -> RunOptions:
    """What the run.toml of a run says, which may be a run that cannot be begun any more.

    Raises:
        ValueError: there is none, or one with counts that no run has.
    """
    _require_run(folder)
    options = parse_flags(lambda: tyro.cli(RunOptions, args=flags_of(folder / FILE)))
    require_counts(options)
    return options


def _require_run(folder: Path) -> None:
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder}: found no {FILE}, expected the folder of a run")


def plan(
    options: Annotated[RunOptions, tyro.conf.arg(name="")] = PLANNED,
    topology: str | None = None,
    host_devices: int | None = None,
    search: bool = False,
    limit: int = 6,
    json: Path | None = None,
) -> None:
    """Compile the step of `run` for devices that nobody here need own: memory, collectives, time.

    Args:
        topology: TPUs to compile for, such as v5p:4x4x4 or v6e:16x16 (pip install 'llama-jax[plan]')
        host_devices: compile for so many devices of this host's CPU instead
        search: try meshes and recomputations, the likeliest first, and rank them
        limit: configurations that the search compiles
        json: a file for the figures; of the search, all plans, the best first
    """
    from train.plan import command

    command.run_plan(
        options,
        topology=topology,
        host_devices=host_devices,
        limit=limit if search else None,
        json_file=json,
    )


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
        tokenizer: a tokenizer.json or tokenizer.model, or the directory that has one
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
    notes: list[str] = []
    with Progress(*columns, console=_CONSOLE) as progress:
        # once to know the files by their contents, then to tokenize them
        bar = progress.add_task("tokenizing", total=2 * total, tokens=0, rate=0)

        def report(read: int, tokens: int) -> None:
            rate = tokens / (time.monotonic() - begun)
            progress.update(bar, completed=total + read, tokens=tokens, rate=rate)

        index = run_tokenize(
            sources,
            tokenizer,
            out,
            text_field=text_field,
            validation_fraction=validation_fraction,
            shard_tokens=shard_tokens,
            eos=eos,
            report=report,
            identified=lambda count: progress.advance(bar, count),
            note=notes.append,
        )
        progress.update(bar, completed=2 * total)
    for split, shards in index.splits.items():
        documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
        _CONSOLE.print(f"{split}: {tokens:,} tokens of {documents:,} documents")
    for line in notes:
        _CONSOLE.print(f"note: {line}")
    _CONSOLE.print(f"written: {printable(str(out))}")


# name on the command line: the function
COMMANDS: dict[str, Callable[..., Any]] = {
    "run": run,
    "resume": resume,
    "export": export,
    "eval": evaluate,
    "plan": plan,
    "tokenize": tokenize,
}


if __name__ == "__main__":
    leave(main())
