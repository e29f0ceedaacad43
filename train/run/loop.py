"""The training loop: from the newest checkpoint to the last step, or until a signal stops it."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax

from llama_jax.checkpoints.huggingface import load_params
from llama_jax.config import LlamaConfig
from llama_jax.formatting import printable
from llama_jax.models.causal_lm import LlamaForCausalLM
from train import startup
from train.data import provenance
from train.data.placement import placed_batches
from train.data.tokens import Source
from train.model.export import export_model
from train.monitoring import metrics_log
from train.monitoring.display import open_display
from train.monitoring.heartbeat import open_heartbeat
from train.monitoring.history import open_history
from train.monitoring.introduction import introduce
from train.monitoring.loggers import open_recorder
from train.monitoring.report_page import FILE as REPORT
from train.monitoring.report_page import write_report
from train.monitoring.reporter import Reporter
from train.options import RunOptions
from train.program.build import Program, initial_opt_state, initial_params, model_of
from train.program.donation import donatable
from train.run.ahead import Ahead
from train.run.continued import continued_opt_state, open_state
from train.run.diagnosis import NO_DIAGNOSIS, Diagnosis, profiling, write_programs
from train.run.evaluation import evaluate_step
from train.run.folder import EXPORTS
from train.run.processes import cause_told_by_runtime
from train.run.remote import name_of
from train.run.saves import Saves
from train.run.stop import agreement, stop_signals


def train_loop(
    program: Program,
    options: RunOptions,
    folder: Path,
    sources: Sequence[Source],
    dataset: Any,
    *,
    until: int | None = None,
    quiet: bool = False,
    diagnosis: Diagnosis = NO_DIAGNOSIS,
) -> bool:
    """Run the remaining steps; evaluate, export and save as often as the options say.

    Returns whether a signal has asked to stop.

    Args:
        folder: the run's; its newest intact checkpoint is where the loop starts.
        sources: of the data, for evaluations and the introduction.
        dataset: training windows, see `train.data.windows.windows`.
        until: evaluate, save and stop after this step, from which the run can be resumed; None for the end.
        quiet: show nothing, and write no page about the run.
        diagnosis: what to show of the step.

    Raises:
        DivergenceError: a loss that is not finite.
        ValueError: a batch without a token in the loss, of data that says which tokens are.
        ValueError: a checkpoint that cannot be saved.
    """
    first_process = jax.process_index() == 0
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(program.mesh))
        beat = stack.enter_context(open_heartbeat(folder))
        beat("starting", 0)
        saves = Saves(folder, options, program)
        stack.push(partial(_close, saves))
        stack.enter_context(cause_told_by_runtime())
        last = saves.last_step()
        name = _step_name(options, last + 1)
        ahead = Ahead(
            program,
            options,
            name,
            dropout_key(program.config, options.seed, last),
            must_trace=diagnosis.hlo is not None,
            # to compile for a GPU is to measure kernels: not while it computes initial values
            begin=last > 0 or program.mesh.devices.flat[0].platform == "cpu",
        )
        restored = saves.restore()
        start, params, opt_state = restored or _first_state(program, options)
        startup.lap("state")
        steps: dict[str, Any] = {"step": program.step, "statistics_step": program.statistics_step}
        display = stack.enter_context(
            open_display(options.steps, start, silent=quiet or not first_process)
        )
        introduce(display, program, options, sources, start)
        record = saves.retrying(stack.enter_context(open_recorder(options.log, folder, start)))
        add_event = saves.retrying(stack.enter_context(open_history(folder)))
        add_event("resume" if restored else "start", start, _machine(program))
        stop_requested = stack.enter_context(stop_signals())
        any_process = agreement(program.mesh)
        batch_rows = partial(
            provenance.batch_rows,
            sources,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            seed=options.seed,
        )
        masked = any(source.open("train").in_loss is not None for source in sources)
        reporter = Reporter(program, options, display, record, batch_rows, masked)
        batches = stack.enter_context(
            closing(placed_batches(program.batch, dataset, start_step=start))
        )
        done = start
        if saves.elsewhere:
            saves.save(start, params, opt_state)
        stack.enter_context(saves.rescuing(lambda: (done, params, opt_state)))
        end = options.steps if until is None else min(until, options.steps)
        startup.lap("monitoring")
        before_step = stack.enter_context(
            profiling(diagnosis, folder, start, display.say, reporter.flush)
        )
        for done in range(start + 1, end + 1):
            waiting_since = time.perf_counter()
            batch = next(batches)
            data_wait = time.perf_counter() - waiting_since
            reporter.poll()
            key = dropout_key(program.config, options.seed, done - 1)
            before_step(done)
            if done == start + 1:
                startup.lap("first batch")
                steps[name] = ahead.step()
                startup.lap("compilation")  # what is left of it
            step = steps[_step_name(options, done)]
            with startup.first_step("step") if done == start + 1 else nullcontext():
                if done == start + 1:
                    write_programs(diagnosis, step, (params, opt_state, batch, key), display.say)
                params, opt_state, metrics, *statistics = step(params, opt_state, batch, key)
                if done == start + 1:
                    jax.block_until_ready(metrics)
            if done == start + 1 and (parts := startup.parts()):
                display.say(startup.in_words(parts))
                add_event("first step", done, startup.in_words(parts), seconds=parts)
            if done == start + 1:
                ahead.keep()
            stop = any_process(stop_requested())
            reporter.submit(done, metrics, stop, data_wait, *statistics)
            if done == start + 1:
                reporter.flush()
            beat("training", done - 1)
            saves.check(done, params, opt_state)

            last = done == end
            evaluating = _due(done, options.evaluation.every) or (last and options.evaluation.every)
            exporting = _due(done, options.export_every)
            saving = _due(done, options.checkpoint.every) or last
            if not (evaluating or exporting or saving or reporter.stopping):
                continue
            reporter.flush()
            if evaluating:
                beat("evaluating", done)
                evaluate_step(
                    program, params, options, sources, folder, done, display=display, record=record
                )
            if exporting:
                beat("exporting", done)
                export_model(model_of(program, params), folder / EXPORTS / f"{done}", folder)
                add_event("export", done)
            if saving or reporter.stopping:
                beat("saving", done)
                saves.save(done, params, opt_state)
                add_event("checkpoint", done)
            if reporter.stopping:
                saves.wait(done, params, opt_state)
                add_event("stop", done, "by a signal")
                beat("stopped", done)
                again = f"python -m train resume {name_of(folder)}"
                display.say(f"stopped after step {done}, saved; resume with: {again}")
                return True
            reporter.restart_clock()  # the next step is timed without all this
        before_step(done + 1)
        saves.wait(done, params, opt_state)
        if end < options.steps:
            add_event("stop", end, "as asked for")
            beat("stopped", end)
            return stop_requested()
        add_event("end", options.steps)
        if first_process and not quiet:
            write_report(folder, folder / REPORT)
        display.say(
            f"done: {printable(str(name_of(folder)))} ({metrics_log.FILE}, {metrics_log.PICTURE}, {REPORT})"
        )
        beat("done", options.steps)
        return stop_requested()


def _close(saves: Saves, error: type[BaseException] | None, *_: Any) -> None:
    # after an error in one of several processes, others may never come to what Orbax would wait for
    if error is None or jax.process_count() == 1:
        saves.close()


def _step_name(options: RunOptions, number: int) -> str:
    """Which step of a program it is."""
    return "statistics_step" if _due(number, options.log.statistics_every) else "step"


def _first_state(program: Program, options: RunOptions) -> tuple[int, Any, Any]:
    """Steps done, parameters, optimizer state: from another run, other weights, or random."""
    source = options.model.init_from
    if source is None:
        params = initial_params(program, options.seed)
    else:
        params = donatable(load_params(LlamaForCausalLM, source, program.params))
    if options.init_from is not None:
        state = open_state(options.init_from)
        return state.step, params, donatable(continued_opt_state(state, program))
    return 0, params, initial_opt_state(program, params)


def _machine(program: Program) -> str:
    devices = program.mesh.devices
    kind = devices.flat[0].device_kind
    return f"{devices.size} x {kind}, {jax.process_count()} processes, jax {jax.__version__}"


def dropout_key(config: LlamaConfig, seed: int, step: int) -> Any:
    """The step's key, a function of seed and step (from 0); None if the model has no dropout."""
    if not config.attention_dropout:
        return None
    return jax.random.fold_in(jax.random.key(seed), step)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
