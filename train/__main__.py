"""`python -m train run|resume|export|eval|report|autopsy|plan|sweep|coordinates|tokenize`."""

import sys

from llama_jax.cli.startup import (
    end_on_interrupt,
    keep_freed_memory,
    restore_garbage_collection,
    without_garbage_collection,
)

if __name__ == "__main__":
    end_on_interrupt()
    if sys.argv[1:2] in (["run"], ["resume"]):
        keep_freed_memory()

import argparse
import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from llama_jax.cli.arguments import Parser, not_negative, positive, program_parser
from llama_jax.cli.compiled_programs import add_cache, keep_compiled_programs
from llama_jax.cli.program import leave, run_program
from llama_jax.files.paths import destination_path, local_path, source_path
from llama_jax.files.remote import remote_path
from llama_jax.formatting import console, printable, progress_bar
from train import startup
from train.flags import OnOff, add_options, parse_options, step_range, with_options
from train.options import (
    COORDINATES,
    FILE,
    PLANNED,
    SWEPT,
    Dtype,
    EvalOptions,
    RunOptions,
    TokenOptions,
)

if TYPE_CHECKING:
    from train.model.evaluate import Evaluation
    from train.run.diagnosis import Diagnosis

_TOML = "TOML file with options, such as a run's run.toml; those on the command line override it"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 an error in one line, 130 interrupted.

    A run that is stopped by SIGTERM, SIGUSR1 or a first SIGINT has saved a checkpoint; its exit code is 75.
    """
    startup.restart()
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Orbax logs its defaults, and errors that it raises as well, with their tracebacks
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    continues = arguments[:1] in (["tokenize"], ["resume"], ["sweep"])

    def command() -> int | None:
        options = _parser().parse_args(arguments)
        code: int | None = options.command(options)
        return code

    try:
        return run_program(
            command,
            interrupted="interrupted: run the same command to continue"
            if continues
            else "interrupted",
            extra="train",
        )
    finally:
        restore_garbage_collection()


def _parser() -> Parser:
    program = program_parser(
        "python -m train", "Pretrain a Llama, evaluate and export it, and plan a run."
    )
    _add_run(program)
    _add_resume(program)
    _add_export(program)
    _add_evaluate(program)
    _add_report(program)
    _add_autopsy(program)
    _add_plan(program)
    _add_sweep(program)
    _add_coordinates(program)
    _add_tokenize(program)
    return program


def _add_run(program: Parser) -> None:
    parser = program.add_command("run", _run, help="pretrain a model")
    parser.add_argument("--toml", type=Path, metavar="FILE", help=_TOML)
    add_cache(parser)
    _add_diagnosis(parser)
    add_options(parser, RunOptions())


def _run(arguments: argparse.Namespace) -> int:
    without_garbage_collection()
    from train.run.begin import begin
    from train.run.continued import options_to_continue
    from train.run.remote import mirrored, new_run, require_one_process
    from train.run.stop import ending_at_once

    options = _options(RunOptions(), arguments)
    if options.init_from is not None:
        options = _options(options_to_continue(options.init_from), arguments)
    _keep_compiled_programs(options, arguments)
    if remote_path(options.out) is None:
        with ending_at_once():
            return _exit_code(
                begin(
                    replace(options, out=local_path(options.out)), diagnosis=_diagnosis(arguments)
                )
            )
    url = destination_path(options.out)
    require_one_process(url, options.distributed)
    with ending_at_once(), new_run(url) as folder, mirrored(folder, url, options.checkpoint):
        stopped = begin(replace(options, out=folder), diagnosis=_diagnosis(arguments))
    return _exit_code(stopped)


def _add_diagnosis(parser: Parser) -> None:
    parser.add_argument(
        "--profile",
        type=step_range,
        metavar="FIRST:LAST",
        help="profile these steps, for xprof, in the folder `profile` of the run",
    )
    parser.add_argument(
        "--dump-hlo",
        type=local_path,
        metavar="DIR",
        help="write the compiled step there as text, before and after XLA's optimization",
    )


def _diagnosis(arguments: argparse.Namespace) -> "Diagnosis":
    from train.run.diagnosis import Diagnosis

    return Diagnosis(arguments.profile, arguments.dump_hlo)


def _exit_code(stopped: bool) -> int:
    from train.run.stop import RESUME

    return RESUME if stopped else 0


def _keep_compiled_programs(options: RunOptions, arguments: argparse.Namespace) -> None:
    """As `--cache` says; without it, not in a run of several processes.

    Of those, some might find the step and others not, which must compile it together.
    """
    from train.run.processes import has_other_processes

    asked = arguments.cache is not None or arguments.no_cache
    if asked or not has_other_processes(options.distributed):
        keep_compiled_programs(arguments)


def _options(defaults: RunOptions, arguments: argparse.Namespace) -> RunOptions:
    """The options of `run` and `plan`: defaults, then those of --toml, then those of the command line."""
    from train.options_toml import flags_of

    if arguments.toml is not None:
        defaults = parse_options(defaults, flags_of(arguments.toml), arguments.toml)
    return with_options(defaults, arguments)


def _add_resume(program: Parser) -> None:
    parser = program.add_command(
        "resume",
        _resume,
        help="resume a run",
        description="Resume a run from its newest checkpoint. Its options come from its run.toml; only "
        "those that do not change the result (mesh, logging, remat, ...) and the number of steps may be "
        "overridden.",
    )
    parser.add_argument(
        "folder", type=local_path, metavar="RUN", help="folder of the run, or its URL"
    )
    add_cache(parser)
    _add_diagnosis(parser)
    add_options(parser, RunOptions(), show_defaults=False)


def _resume(arguments: argparse.Namespace) -> int:
    without_garbage_collection()
    from train.run.stop import ending_at_once

    with ExitStack() as stack:
        stack.enter_context(ending_at_once())
        url = remote_path(arguments.folder)
        folder = _run_folder(arguments.folder, None, stack)
        saved = _saved_options(folder)
        options = with_options(saved, arguments)
        _keep_compiled_programs(options, arguments)

        from train.run.remote import mirrored, require_one_process
        from train.run.resume import resume

        if url is not None:
            require_one_process(url, options.distributed)
            stack.enter_context(mirrored(folder, url, options.checkpoint))
        stopped = resume(folder, saved, options, diagnosis=_diagnosis(arguments))
    return _exit_code(stopped)


def _add_export(program: Parser) -> None:
    parser = program.add_command(
        "export",
        _export,
        help="write the model of a run as a Hugging Face directory, with its tokenizer",
    )
    parser.add_argument(
        "folder", type=local_path, metavar="RUN", help="folder of the run, or its URL"
    )
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="directory to write; must not contain a checkpoint",
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), help="dtype to write; default: that of the parameters"
    )
    parser.add_argument(
        "--average",
        action=OnOff,
        default=False,
        help="write the average of the parameters, of a run with --average.decay",
    )
    parser.add_argument(
        "--verify",
        action=OnOff,
        default=False,
        help="load the directory with transformers, and compare PyTorch's validation loss with the run's",
    )
    parser.add_argument(
        "--with-optimizer",
        action=OnOff,
        default=False,
        help="also write what training continues from, in PyTorch or here, to DIR/training_state: moments, "
        "step, schedule, the batches to come",
    )
    parser.add_argument(
        "--batches",
        type=not_negative,
        metavar="N",
        help="with --with-optimizer, steps whose batches are listed; default: all that remain",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload DIR to this repository on the Hub; a new one is private",
    )


def _add_checkpoint(parser: Parser) -> None:
    parser.add_argument(
        "--step", type=int, metavar="N", help="checkpoint of the run; default: the newest"
    )


def _export(arguments: argparse.Namespace) -> None:
    from llama_jax.files.hub import push, require_pushable
    from llama_jax.files.upload import output_directory, require_absent

    if arguments.push is not None:
        require_pushable(arguments.push)
    target = remote_path(arguments.directory)
    if target is not None:
        require_absent(target)
    with ExitStack() as stack:
        folder = _run_folder(arguments.folder, arguments.step, stack)
        directory = stack.enter_context(output_directory(arguments.directory))
        step = _export_folder(folder, directory, target or directory, arguments)
        if arguments.push is not None:
            address = push(directory, arguments.push, message=f"Step {step}")
            console(stderr=True, soft_wrap=True).print(f"pushed: {printable(address)}")


def _run_folder(folder: Path, step: int | None, stack: ExitStack) -> Path:
    """The folder of a run or, of a remote one, a copy of it with the checkpoint of `step`."""
    url = remote_path(folder)
    if url is None:
        return folder

    from train.run.remote import local_run

    return stack.enter_context(local_run(url, step))


def _export_folder(folder: Path, directory: Path, name: Path, arguments: argparse.Namespace) -> int:
    """Export and verify; returns the step. `name` is what the user calls `directory`."""
    from train.model.export import export_run, verify_export

    dtype = arguments.dtype
    say = console(stderr=True, soft_wrap=True)
    options = _saved_options(folder)
    step = export_run(
        folder,
        options,
        directory,
        step=arguments.step,
        dtype=dtype,
        average=arguments.average,
        with_optimizer=arguments.with_optimizer,
        batches=arguments.batches,
    )
    say.print(f"written: {printable(str(name))}, step {step}")
    if arguments.verify:
        loss = verify_export(
            folder, options, directory, step=step, dtype=dtype, average=arguments.average
        )
        reported = "none at that step" if loss.reported is None else f"{loss.reported:.6f}"
        say.print(
            f"validation loss over {loss.num_tokens:,} tokens: PyTorch {loss.torch:.6f}, here "
            f"{loss.ours:.6f}, reported by the run {reported}"
        )
    return step


def _add_evaluate(program: Parser) -> None:
    parser = program.add_command(
        "eval",
        _evaluate,
        help="compute validation loss, perplexity and bits per byte of a run or a Hugging Face directory",
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="RUN|DIR",
        help="folder of a run, a Hugging Face directory, or a name on the Hub",
    )
    parser.add_argument(
        "--data",
        nargs="*",
        default=(),
        metavar="DIR",
        help="token directories; default: those of the run",
    )
    parser.add_argument(
        "--batches",
        type=not_negative,
        default=0,
        metavar="N",
        help="batches to evaluate; 0: all of them",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="rows per batch"
    )
    parser.add_argument(
        "--sequence-length",
        type=positive,
        metavar="N",
        help="tokens per row; default: the run's, or the model's up to 2048",
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        default="float32",
        help="dtype of the parameters and of the computation",
    )
    parser.add_argument(
        "--average",
        action=OnOff,
        default=False,
        help="evaluate the average of the parameters, of a run with --average.decay",
    )
    add_cache(parser)
    add_options(parser, EvalOptions())


def _evaluate(arguments: argparse.Namespace) -> None:
    from train.model.evaluate import evaluate_target, pooled

    keep_compiled_programs(arguments)
    with ExitStack() as stack:
        target, saved = source_path(arguments.target), None
        if (target / FILE).is_file():
            target = _run_folder(target, arguments.step, stack)
            saved = _saved_options(target)
        # the run has a copy of its tokenizer
        tokens = TokenOptions() if saved is None else replace(saved.tokens, tokenizer=None)
        evaluations = evaluate_target(
            target,
            tuple(arguments.data),
            saved,
            limit=arguments.batches,
            batch_size=arguments.batch_size,
            sequence_length=arguments.sequence_length,
            step=arguments.step,
            dtype=arguments.dtype,
            tokens=with_options(EvalOptions(tokens), arguments).tokens,
            average=arguments.average,
        )
    _print_evaluation(pooled([*evaluations.values()]))
    for name, evaluation in evaluations.items() if len(evaluations) > 1 else ():
        _print_evaluation(evaluation, f"  {printable(name)}")


def _print_evaluation(evaluation: "Evaluation", name: str = "") -> None:
    bits = evaluation.bits_per_byte
    print(
        f"loss {evaluation.loss:.6f}  perplexity {evaluation.perplexity:.4f}  "
        f"{'' if bits is None else f'bits per byte {bits:.4f}  '}tokens {evaluation.num_tokens:,}{name}"
    )


def _saved_options(folder: Path) -> RunOptions:
    """The options in the run.toml of a run, which need not be ones that a run can still begin with.

    Raises:
        ValueError: no run.toml, or one with wrong values.
    """
    from train.option_checks import require_counts
    from train.options_toml import flags_of

    file = folder / FILE
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory, expected the folder of a run")
    if not file.is_file():
        raise ValueError(f"{folder}: not the folder of a run: it has no {FILE}")
    options = parse_options(RunOptions(), flags_of(file), file)
    require_counts(options)
    return options


def _add_report(program: Parser) -> None:
    parser = program.add_command(
        "report",
        _report,
        help="write one HTML page about a run: loss, throughput, statistics, events, options",
    )
    parser.add_argument(
        "folder", type=local_path, metavar="RUN", help="folder of the run, or its URL"
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="file to write; default: report.html in the folder",
    )


def _report(arguments: argparse.Namespace) -> None:
    from train.monitoring.report_page import FILE as REPORT
    from train.monitoring.report_page import write_report

    page = arguments.html
    if remote_path(arguments.folder) is not None and page is None:
        raise ValueError(f"{arguments.folder}: is remote; name a local file with --html FILE")
    with ExitStack() as stack:
        folder = _run_folder(arguments.folder, None, stack)
        if not (folder / FILE).is_file():
            raise ValueError(f"{arguments.folder}: not the folder of a run: it has no {FILE}")
        page = folder / REPORT if page is None else local_path(page)
        write_report(folder, page)
    console(stderr=True, soft_wrap=True).print(f"written: {printable(str(page))}")


def _add_autopsy(program: Parser) -> None:
    parser = program.add_command(
        "autopsy",
        _autopsy,
        help="replay a step of a run, and say which document, layer or term of the optimizer is at fault",
        description="Replay a step of a run from a checkpoint, record everything about it, rank what may "
        "have caused a spike, and replay it with one thing changed. Nothing in RUN is changed.",
    )
    parser.add_argument("folder", type=local_path, metavar="RUN", help="folder of the run")
    parser.add_argument("step", type=int, metavar="STEP", help="step to examine, counted from 1")
    parser.add_argument(
        "--horizon",
        type=not_negative,
        default=4,
        metavar="K",
        help="steps after STEP for which to tell what would have happened; 0: do not tell",
    )
    parser.add_argument(
        "--history",
        type=not_negative,
        default=32,
        metavar="N",
        help="steps before STEP that tell what is usual, replayed from an earlier checkpoint if need be",
    )
    parser.add_argument(
        "--beta2",
        type=float,
        metavar="X",
        help="to try instead of the run's; default: 0.99, or 0.95 if the run's is at least that",
    )
    parser.add_argument(
        "--from-start",
        action=OnOff,
        default=False,
        help="replay from the initial weights instead of a checkpoint",
    )
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write all that was found as JSON"
    )
    parser.add_argument("--html", type=local_path, metavar="FILE", help="also write a page")
    parser.add_argument(
        "--data",
        nargs="*",
        metavar="PATH",
        help="where the run's data is now; default: where it was",
    )
    add_cache(parser)


def _autopsy(arguments: argparse.Namespace) -> None:
    if (url := remote_path(arguments.folder)) is not None:
        raise ValueError(f"{url}: is remote; copy the run to this machine first")
    saved = _saved_options(arguments.folder)
    keep_compiled_programs(arguments)

    from train.autopsy.command import run_autopsy

    run_autopsy(
        arguments.folder,
        saved if not arguments.data else replace(saved, data=tuple(arguments.data)),
        arguments.step,
        horizon=arguments.horizon,
        history=arguments.history,
        beta2=arguments.beta2,
        from_start=arguments.from_start,
        json_file=arguments.json,
        page=arguments.html,
    )


def _add_plan(program: Parser) -> None:
    parser = program.add_command(
        "plan",
        _plan,
        help="estimate memory, communication and time of a step, without having the devices",
    )
    parser.add_argument(
        "--topology",
        metavar="TEXT",
        help="TPUs to compile for, such as v5p:4x4x4 or, two slices, 2xv6e:16x16 (needs libtpu: pip "
        "install '.[plan]'), or GPUs, such as h100:8 or, on 64 hosts, h100:64x8 (needs make plan-gpu)",
    )
    parser.add_argument(
        "--host-devices",
        type=int,
        metavar="N",
        help="compile for this many devices of the host's CPU instead",
    )
    parser.add_argument(
        "--search",
        action=OnOff,
        default=False,
        help="try meshes and remat policies, the most promising first, and rank them",
    )
    parser.add_argument(
        "--limit", type=int, default=6, metavar="N", help="how many of them the search compiles"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the plan, or all ranked plans, as JSON",
    )
    parser.add_argument("--toml", type=Path, metavar="FILE", help=_TOML)
    add_options(parser, PLANNED)


def _plan(arguments: argparse.Namespace) -> None:
    # XLA reads this when JAX is loaded; it warns of shardings that nobody can choose here
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from train.plan.command import run_plan

    run_plan(
        _options(PLANNED, arguments),
        topology=arguments.topology,
        host_devices=arguments.host_devices,
        limit=arguments.limit if arguments.search else None,
        json_file=arguments.json,
    )


def _add_sweep(program: Parser) -> None:
    parser = program.add_command(
        "sweep",
        _sweep,
        help="train over a grid of options on this machine, and compare the losses",
        description="Train a run for every combination of the values of some options, one after the other, "
        "and compare the losses: a table, sweep.json and sweep.png. After an interruption, or with more "
        "values, run the command again; runs that are done are kept.",
    )
    parser.add_argument(
        "--grid",
        action="extend",
        nargs="*",
        default=[],
        metavar="NAME=VALUE,...",
        help="an option of `train run` and its values; the first one is drawn along the horizontal axis",
    )
    parser.add_argument(
        "--halving",
        type=not_negative,
        default=0,
        metavar="N",
        help="successive halving: run all to 1/2^N of the steps, the better half to twice as many, and "
        "so on N times; 0: run all to the end",
    )
    parser.add_argument("--toml", type=Path, metavar="FILE", help=_TOML)
    add_cache(parser)
    add_options(parser, SWEPT)


def _sweep(arguments: argparse.Namespace) -> None:
    from train.sweep.command import run_sweep

    keep_compiled_programs(arguments)
    run_sweep(_options(SWEPT, arguments), arguments.grid, arguments.halving)


def _add_coordinates(program: Parser) -> None:
    parser = program.add_command(
        "coordinates",
        _coordinates,
        help="check how the size of activations depends on the width, in the first steps",
        description="The coordinate check of muP: train models of several widths for a few steps, all on "
        "one batch, and see whether the size of their activations depends on the width: a table, "
        "coordinates.json and coordinates.png.",
    )
    parser.add_argument(
        "--widths",
        type=positive,
        nargs="+",
        default=[128, 256, 512, 1024],
        metavar="N",
        help="hidden sizes; heads and MLP of the model are in proportion (default: 128 256 512 1024)",
    )
    parser.add_argument(
        "--wider-heads",
        action=OnOff,
        default=False,
        help="the number of heads stays that of the model, and each grows with the width",
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        default=3,
        metavar="N",
        help="initial values to average over (default: 3)",
    )
    parser.add_argument(
        "--compare",
        action=OnOff,
        default=False,
        help="also check the standard parametrization, and draw it below",
    )
    parser.add_argument("--toml", type=Path, metavar="FILE", help=_TOML)
    add_cache(parser)
    add_options(parser, COORDINATES)


def _coordinates(arguments: argparse.Namespace) -> None:
    from train.coordinates.command import run_coordinates

    keep_compiled_programs(arguments)
    run_coordinates(
        _options(COORDINATES, arguments),
        arguments.widths,
        wider_heads=arguments.wider_heads,
        compare=arguments.compare,
        seeds=arguments.seeds,
    )


def _add_tokenize(program: Parser) -> None:
    parser = program.add_command(
        "tokenize",
        _tokenize,
        help="turn text into token files for training",
        description="Turn text into token files for training. After an interruption, run the same command "
        "to continue.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="files, directories or globs of text, .jsonl, .parquet, .arrow; text also as .gz or .zst",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="PATH",
        help="tokenizer.json or tokenizer.model, a directory that has one, or a name on the Hub",
    )
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="directory to write"
    )
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        help="field of JSON lines, or column of Parquet or Arrow; default: text, or messages for chats",
    )
    parser.add_argument(
        "--chat",
        action=OnOff,
        default=False,
        help="documents are conversations: apply the tokenizer's chat template, and train on the turns of "
        "the assistant only",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.005,
        metavar="X",
        help="fraction of the documents to hold out for validation",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 25,
        metavar="N",
        help="tokens per shard; a shard is held in memory",
    )
    parser.add_argument(
        "--eos",
        metavar="TOKEN",
        help="end-of-text token; default: the one named by the tokenizer's files",
    )


def _tokenize(arguments: argparse.Namespace) -> None:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    from train.data import tokenize
    from train.data.documents import source_files

    say = console(stderr=True, soft_wrap=True)
    total = sum(
        file.stat().st_size for source in arguments.sources for file in source_files(source)
    )
    speed = TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s")
    columns = (BarColumn(), DownloadColumn(), speed, TimeRemainingColumn())
    begin = time.monotonic()
    notes: list[str] = []
    with progress_bar(*columns, console=say) as progress:
        # the files are read twice: to identify them by their contents, then to tokenize them
        bar = progress.add_task("tokenizing", total=2 * total, tokens=0, rate=0)

        def report(read: int, tokens: int) -> None:
            rate = tokens / (time.monotonic() - begin)
            progress.update(bar, completed=total + read, tokens=tokens, rate=rate)

        index = tokenize.tokenize(
            arguments.sources,
            arguments.tokenizer,
            arguments.out,
            text_field=arguments.text_field,
            chat=arguments.chat,
            validation_fraction=arguments.validation_fraction,
            shard_tokens=arguments.shard_tokens,
            eos=arguments.eos,
            report=report,
            identified=lambda count: progress.advance(bar, count),
            note=notes.append,
        )
        progress.update(bar, completed=2 * total)
    for split, shards in index.splits.items():
        documents = sum(shard.documents for shard in shards)
        tokens = sum(shard.tokens for shard in shards)
        say.print(f"{split}: {tokens:,} tokens of {documents:,} documents")
    for line in notes:
        say.print(f"warning: {line}")
    say.print(f"written: {printable(str(arguments.out))}")


if __name__ == "__main__":
    leave(main())
