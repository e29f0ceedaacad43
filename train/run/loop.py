"""A pretraining run: begun, gone on with after any end, and what it leaves in its folder.

run.toml (the resolved options), config.json (the model), data.json (what it is trained on), tokenizer/,
generation_config.json (of the weights it started from, if they had one), checkpoints/, metrics.jsonl,
loss.png.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.checkpoints.fit import fit, open_weights
from llama_jax.checkpoints.huggingface import load_params
from llama_jax.config import LlamaConfig
from llama_jax.files.staging import write_text
from llama_jax.formatting import first_line, printable
from llama_jax.formatting import report as faults_report
from llama_jax.generation.config import read_generation_config
from llama_jax.inspection.architecture import forward_flops_per_token, parameter_count
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.text.companions import RUN_TOKENIZER, copy_companions
from train import checkpoints
from train.data import identity
from train.data.placement import placed_batches
from train.data.sources import common_index, find_sources, require_same_tokenizer
from train.data.token_shards import Index, Split, read_index
from train.data.windows import windows
from train.hardware.chips import peak_flops
from train.model.config import model_config
from train.model.evaluate import Evaluation, evaluate
from train.model.export import export_model
from train.model.sample import sample_text
from train.monitoring import metrics_log
from train.monitoring.display import Display, display
from train.monitoring.loggers import open_loggers, require_loggers
from train.option_checks import validate
from train.options import FILE, RunOptions, with_absolute_paths, with_defaults
from train.options_toml import to_toml
from train.program.build import (
    Program,
    initial_opt_state,
    initial_params,
    model_of,
    run_program,
)
from train.program.mesh import in_words
from train.program.step import Metrics
from train.run.changes import differences, faults
from train.run.lock import locked
from train.run.stop import agreement, stop_signals

CONFIG = "config.json"


def run(options: RunOptions) -> None:
    """Begin a run in the folder `options.out`, which must not hold one.

    Raises:
        ValueError: options that are wrong in themselves, or do not fit the data, model or devices; a
            loss that is no longer finite; a checkpoint that cannot be saved.
    """
    validate(options)
    folder = options.out
    if (folder / FILE).exists():
        raise ValueError(
            f"{folder}: found a run, expected a new folder: give --out, or go on with "
            f"`python -m train resume {folder}`"
        )
    if (folder / checkpoints.FOLDER).exists():
        raise ValueError(f"{folder}: found checkpoints, expected a new folder: give --out")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: found a file, expected a new folder")
    checkpoints.require_place(folder)
    require_loggers(options.log)
    _join_processes(options)
    options = with_defaults(with_absolute_paths(options), jax.default_backend())
    sources = find_sources(options.data)
    index = common_index(sources)
    tokenizer = options.model.init_from or sources[0][0]
    if options.model.init_from is not None:
        require_same_tokenizer(tokenizer, sources[0][0])
    elif missing := [name for name in index.tokenizer if not (tokenizer / name).is_file()]:
        raise ValueError(f"{tokenizer / missing[0]}: not found, expected the tokenizer of the data")
    config = model_config(options.model, index, options.sequence_length)
    dataset = _training_windows(options, config, sources)
    program = run_program(options, config)
    if options.model.init_from is not None:
        _require_start(options, config, index)
    with ExitStack() as stack:
        if jax.process_index() == 0:
            # whatever can fail has been tried before there is a folder; run.toml last, it makes a run of it
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            copy_companions(tokenizer, folder / RUN_TOKENIZER, generation=False)
            if options.model.init_from is not None:
                copy_companions(options.model.init_from, folder, tokenizer=False)
            write_text(folder / CONFIG, json.dumps(config.to_dict(), indent=2) + "\n")
            identity.write_identity(folder, sources)
            write_text(folder / FILE, to_toml(options))
        _train(program, options, folder, sources, dataset)


def resume(folder: Path, saved: RunOptions, options: RunOptions) -> None:
    """Go on with the run in `folder` from its newest whole checkpoint, or from the start without one.

    `steps` may be another number as long as the learning rates of the steps already done stay what they
    were: always with a constant schedule, with wsd until its decay begins.

    Args:
        saved: what its run.toml says.
        options: the same, with what may change changed: steps, mesh, logging, where it computes, and
            where the same data lies.

    Raises:
        ValueError: as `run`; a folder without a run, or one that another process runs; options that would
            make it another run; data that is not what it began with.
    """
    options = with_absolute_paths(options)
    _require_valid(saved, options)
    checkpoints.require_place(folder)
    moved = identity.may_be_moved(folder, saved.data, options.data)
    changed = differences(replace(saved, data=options.data) if moved else saved, options)
    changed += faults(saved, options, steps_done(folder))
    if changed:
        raise ValueError(f"{folder}: is another run: {'; '.join(changed)}")
    _join_processes(options)
    with ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(locked(folder))
        sources = find_sources(options.data)
        for directory, _ in sources:
            if not directory.exists():
                raise ValueError(
                    f"{directory}: not found, expected the data of {folder}: restore it, or name the place "
                    "it was moved to with --data"
                )
        index = common_index(sources)
        remedy = "restore it, or begin a new run with `python -m train run`"
        identity.require_identity(folder, sources, remedy)
        if index.vocab_size > (config := LlamaConfig.from_pretrained(folder)).vocab_size:
            raise ValueError(
                f"{folder}: found a model of {config.vocab_size} tokens, expected at least "
                f"{index.vocab_size}, the data's"
            )
        dataset = _training_windows(options, config, sources)
        program = run_program(options, config)
        kept = replace(saved, steps=options.steps, data=options.data)
        if kept != saved and jax.process_index() == 0:
            staged = folder / f".{FILE}.tmp"
            write_text(staged, to_toml(kept))
            staged.replace(folder / FILE)
        _train(program, options, folder, sources, dataset)


def _require_valid(saved: RunOptions, options: RunOptions) -> None:
    try:
        validate(options)
    except ValueError as error:
        if options != saved:
            raise
        # as an earlier version let it begin
        raise ValueError(
            f"{error}; such a run cannot be resumed: `python -m train export` its weights and begin a new "
            "run from them with --model.init-from"
        ) from None


def _require_start(options: RunOptions, config: LlamaConfig, index: Index) -> None:
    """Raise ValueError for weights to start from that do not fit; only their headers are read.

    Warns:
        UserWarning: the data ends its documents with a token at which generation would not end.
    """
    directory = options.model.init_from
    assert directory is not None
    dtype = options.model.parameter_dtype
    found = fit(LlamaForCausalLM, config, open_weights(directory), directory, dtype)
    if faults := [*found.faults, *(f"{name}: missing" for name in found.new)]:
        raise ValueError(faults_report(f"{directory}: {len(faults)} faults", faults))
    ends = read_generation_config(directory, config).eos_token_ids
    if ends and index.eos_id is not None and index.eos_id not in ends:
        warnings.warn(
            f"the data ends its documents with token {index.eos_id}, generation from {directory} ends "
            f"with {', '.join(map(str, ends))}: name the token with `tokenize --eos`, or change the run's "
            "generation_config.json",
            stacklevel=2,
        )


def steps_done(folder: Path) -> int:
    """The steps of the newest checkpoint, damaged or not; 0 without one."""
    saved = (folder / checkpoints.FOLDER).glob("*")
    return max((int(each.name) for each in saved if each.name.isdigit()), default=0)


def _training_windows(
    options: RunOptions, config: LlamaConfig, sources: Sequence[tuple[Path, float]]
) -> Any:
    """The windows of every step, of data that is as its index says.

    That there is a validation split, where one is asked for, is tried too.
    """
    splits: list[Split] = ["train"]
    if options.evaluation.every:
        splits.append("validation")
        for directory, _ in sources:
            _require_validation(directory, read_index(directory))
    identity.require_intact(sources, splits)
    return windows(
        sources,
        split="train",
        sequence_length=options.sequence_length,
        vocab_size=config.vocab_size,
        seed=options.seed,
    )


def _require_validation(directory: Path, index: Index) -> None:
    if index.complete and not index.splits["validation"]:
        raise ValueError(
            f"{directory}: found no document in the validation split, expected at least one: give "
            "--evaluation.every 0 to run without evaluations, or tokenize with a larger "
            "--validation-fraction or more documents"
        )


def _train(
    program: Program,
    options: RunOptions,
    folder: Path,
    sources: Sequence[tuple[Path, float]],
    dataset: Any,
) -> None:
    """From the newest checkpoint to the last step, or to a signal."""
    first = jax.process_index() == 0
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(program.mesh))
        keep = options.checkpoint
        manager = checkpoints.open_manager(
            folder, keep_last=keep.keep_last, keep_every=keep.keep_every
        )
        stack.callback(manager.close)
        start, params, opt_state = _initial_state(program, options, manager)
        show = stack.enter_context(display(options.steps, start, silent=not first))
        _introduce(show, program, options, start)
        _say_amount(show, options, sources)
        log = stack.enter_context(metrics_log.open_metrics(folder, start)) if first else None
        loggers = stack.enter_context(open_loggers(options.log, folder)) if first else ()

        def record(figures: dict[str, Any]) -> None:
            if log is not None:
                metrics_log.write_line(log, figures)
            for logger in loggers:
                logger(figures)

        asked = stack.enter_context(stop_signals())
        any_of = agreement(program.mesh)
        clock = Clock()
        report = _reporter(program, options, show, record, clock)
        read = stack.enter_context(
            closing(placed_batches(program.batch, dataset, start_step=start))
        )
        pending: tuple[int, Any, jax.Array, float] | None = None
        stopping = False
        for step in range(start, options.steps):
            begin = time.perf_counter()
            batch = next(read)
            waited = time.perf_counter() - begin
            # where a step was computed before its call returned, its figures are there already
            if pending is not None and pending[1].loss.is_ready():
                stopping = report(*pending)
                pending = None
            key = _dropout_key(program.config, options.seed, step)
            params, opt_state, metrics = program.step(params, opt_state, batch, key)
            stop = any_of(asked())
            # the figures of the step before are there while this one computes
            if pending is not None:
                stopping = report(*pending) or stopping
            pending = step + 1, metrics, stop, waited
            done, last = step + 1, step + 1 == options.steps
            evaluating = _due(done, options.evaluation.every) or (last and options.evaluation.every)
            exporting = _due(done, options.export_every)
            saving = _due(done, keep.every) or last or stopping
            if not (evaluating or exporting or saving):
                continue
            stopping = report(*pending) or stopping
            pending = None
            if evaluating:
                _evaluate(program, params, options, sources, folder, done, show, record)
            if exporting:
                export_model(model_of(program, params), folder / "exports" / f"{done}", folder)
            if saving or stopping:
                facts = {
                    "seed": options.seed,
                    "next_window": done * options.batch_size,
                    "options": to_toml(options),
                    "model": program.config.to_dict(),
                }
                checkpoints.save(manager, done, params, opt_state, facts)
            if stopping:
                checkpoints.wait(manager)
                show.say(
                    f"stopped after step {done}, saved; go on: python -m train resume {folder}"
                )
                return
            clock.lap()  # what came between is no part of the next step
        checkpoints.wait(manager)
        if first:
            metrics_log.draw_loss(folder)
        show.say(f"done: {printable(str(folder))} ({metrics_log.FILE}, {metrics_log.PICTURE})")


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last one."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def _initial_state(program: Program, options: RunOptions, manager: Any) -> tuple[int, Any, Any]:
    """Steps done, parameters and optimizer state: of a checkpoint, of other weights, or random."""
    restored = checkpoints.restore(
        manager, program.params, program.opt_state, model=program.config.to_dict()
    )
    if restored is not None:
        return restored
    source = options.model.init_from
    if source is None:
        params = initial_params(program, options.seed)
    else:
        params = load_params(LlamaForCausalLM, source, program.params)
    return 0, params, initial_opt_state(program, params)


def _reporter(
    program: Program,
    options: RunOptions,
    show: Display,
    record: Callable[[dict[str, Any]], None],
    clock: Clock,
) -> Callable[[int, Metrics, jax.Array, float], bool]:
    """`report(step, metrics, stop, data_wait)`: wait for a step, record it; whether to stop after it."""
    compute_dtype = options.model.compute_dtype
    peak = options.log.peak_flops or peak_flops(jax.devices()[0], jnp.dtype(compute_dtype))
    devices = len(jax.devices())
    flops = 3 * forward_flops_per_token(program.config, options.sequence_length)
    tokens = options.batch_size * options.sequence_length

    def report(step: int, metrics: Metrics, stop: jax.Array, waited: float) -> bool:
        values = jax.device_get(metrics)
        seconds = clock.lap()
        loss, norm = float(values.loss), float(values.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(
                f"step {step}: found loss {loss} and gradient norm {norm}, expected finite numbers: try a "
                "lower --optimizer.learning-rate; earlier checkpoints are kept"
            )
        figures = {
            "step": step,
            "loss": loss,
            "z_loss": float(values.z_loss),
            "grad_norm": norm,
            "learning_rate": float(program.learning_rate(step - 1)),
            "num_tokens": int(values.num_tokens),
            "seconds": seconds,
            "data_wait": waited,
            "tokens_per_second": tokens / seconds,
            "mfu": None if peak is None else tokens / seconds * flops / (peak * devices),
        }
        record(figures)
        show.step(figures, options.steps)
        return bool(jax.device_get(stop))

    return report


def _evaluate(
    program: Program,
    params: Any,
    options: RunOptions,
    sources: Sequence[tuple[Path, float]],
    folder: Path,
    step: int,
    show: Display,
    record: Callable[[dict[str, Any]], None],
) -> None:
    found: Evaluation = evaluate(program, params, sources, limit=options.evaluation.batches)
    figures: dict[str, Any] = {
        "step": step,
        "validation_loss": found.loss,
        "perplexity": found.perplexity,
        "validation_tokens": found.num_tokens,
    }
    show.say(f"step {step}: validation loss {found.loss:.4f}, perplexity {found.perplexity:.2f}")
    wanted = options.evaluation.sample_tokens
    # the sample is generated on this process's devices alone, which must hold the whole model
    if wanted and jax.process_count() == 1:
        prompt = options.evaluation.sample_prompt
        text = sample_text(model_of(program, params), folder / RUN_TOKENIZER, prompt, wanted)
        figures["sample"] = text
        show.say(repr(text))
    record(figures)
    if jax.process_index() == 0:
        metrics_log.draw_loss(folder)


def _introduce(show: Display, program: Program, options: RunOptions, start: int) -> None:
    config, mesh = program.config, program.mesh
    show.say(
        f"{parameter_count(config):,} parameters, {options.model.compute_dtype} over "
        f"{options.model.parameter_dtype}; mesh {in_words(mesh.shape)} on {jax.devices()[0].device_kind}; "
        f"{options.batch_size} x {options.sequence_length} tokens a step"
    )
    flops = 3 * forward_flops_per_token(config, options.sequence_length)
    show.say(
        f"model FLOPs per token = 3 x (2 x matrix weights + 2 x layers x width x (seq + 1)) = {flops:.3g}"
    )
    if start >= options.steps:
        show.say(f"all {start} steps are done already; more of them: resume with --steps")
    elif start:
        show.say(f"resumed after step {start}")


def _say_amount(show: Display, options: RunOptions, sources: Sequence[tuple[Path, float]]) -> None:
    """How often the run will have read its data, which is then known before it begins."""
    indexes = [read_index(directory) for directory, _ in sources]
    held = sum(shard.tokens for index in indexes for shard in index.splits["train"])
    step = options.batch_size * options.sequence_length
    times = options.steps * step / held
    show.say(f"{held:,} training tokens; {options.steps} steps read {times:.3g} times as many")
    if step > held:
        show.say(f"note: a step alone reads {step:,} tokens, more than there are: it repeats them")


def _dropout_key(config: LlamaConfig, seed: int, step: int) -> Any:
    """The step's key, a function of seed and step; None where the model has no dropout."""
    if not config.attention_dropout:
        return None
    return jax.random.fold_in(jax.random.key(seed), step)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _join_processes(options: RunOptions) -> None:
    """Join the other processes, where there are any."""
    wanted = options.distributed
    if not wanted.enabled and wanted.coordinator is None:
        return
    # before the backend starts; other platforms have collectives of their own
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(wanted.coordinator, wanted.processes, wanted.process_id)
    except Exception as error:
        raise ValueError(f"distributed: cannot be initialized ({first_line(error)})") from None
