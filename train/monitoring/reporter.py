"""Metrics of steps, read one step late so that the device never waits for the host."""

import math
import time
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.inspection.architecture import forward_flops_per_token
from train.hardware.chips import peak_flops
from train.monitoring.display import Display
from train.monitoring.events import BatchRows, finite_or_none, guard_event, in_words
from train.monitoring.loggers import Recorder
from train.monitoring.statistics_record import statistics_record
from train.options import RunOptions
from train.program.build import Program
from train.program.guard import value_names
from train.program.statistics import Statistics
from train.program.step import DivergenceError, Metrics


class _Submitted(NamedTuple):
    """A step that has been dispatched and not reported; reading its arrays waits for the device."""

    step: int
    metrics: Metrics
    stop: jax.Array
    data_wait: float
    statistics: Statistics | None


class Reporter:
    """Shows and records the metrics of every step once the device has computed them.

    A step is submitted right after its dispatch, and reported when the next one has been dispatched: the
    device computes while the host reads, writes and draws.

    stopping: whether a reported step carried the request to stop.
    """

    def __init__(
        self,
        program: Program,
        options: RunOptions,
        display: Display,
        record: Recorder,
        batch_rows: BatchRows | None = None,
        masked: bool = False,
    ) -> None:
        """Begin to report.

        Args:
            batch_rows: needed where the run has a guard, to say what the batch had.
            masked: the data says which tokens are in the loss, so that a batch may have none by mistake.
        """
        self.stopping = False
        self._display, self._record = display, record
        self._program, self._guard, self._batch_rows = program, options.guard, batch_rows
        self._masked = masked
        self._steps, self._learning_rate = options.steps, program.learning_rate
        self._tokens_per_step = options.batch_size * options.sequence_length
        self._given_peak = options.log.peak_flops
        self._dtype = jnp.dtype(options.model.compute_dtype)
        self._flops_per_token = 3 * forward_flops_per_token(program.config, options.sequence_length)
        self._submitted: _Submitted | None = None
        self.restart_clock()

    @cached_property
    def _peak_flops(self) -> float | None:
        """Of all devices; measured on a CPU, which no step should wait for."""
        peak = self._given_peak or peak_flops(jax.devices()[0], self._dtype)
        return None if peak is None else peak * len(jax.devices())

    def submit(
        self,
        step: int,
        metrics: Metrics,
        stop: jax.Array,
        data_wait: float,
        statistics: Statistics | None = None,
    ) -> None:
        """Report the step before, and hold this one until it is computed.

        Args:
            step: steps done with this one.
            stop: a boolean scalar, the same in all processes: whether to stop after this step.
            data_wait: seconds for which the loop waited for the batch.
            statistics: of the step, if it is one that has them.

        Raises:
            DivergenceError: a loss or gradient norm that is not finite, in more steps in a row than the
                guard leaves out.
            ValueError: a batch of masked data without a token in the loss.
        """
        self.flush()
        self._submitted = _Submitted(step, metrics, stop, data_wait, statistics)

    def poll(self) -> None:
        """Report the submitted step if it is computed already, as where a step's call is synchronous."""
        if self._submitted is None:
            return
        loss: Any = self._submitted.metrics.loss  # jax.Array's types lack is_ready
        if loss.is_ready():
            self.flush()

    def flush(self) -> None:
        """Wait for the submitted step, if there is one, and report it. Raises as `submit`."""
        if self._submitted is not None:
            submitted, self._submitted = self._submitted, None
            self._report(*submitted)

    def restart_clock(self) -> None:
        """Time the next step from now on, rather than from the report of the last one."""
        self._reported_at = time.perf_counter()

    def _report(
        self,
        step: int,
        metrics: Metrics,
        stop: jax.Array,
        data_wait: float,
        statistics: Statistics | None,
    ) -> None:
        values = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._reported_at = now - self._reported_at, now
        loss, grad_norm = float(values.loss), float(values.grad_norm)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self._masked and not values.num_tokens:
            raise ValueError(
                f"step {step}: its batch has no token in the loss: begin again with a larger --batch-size "
                "or --sequence-length, or with data of which more is in the loss"
            )
        in_a_row = 0 if values.guard is None else int(values.guard.non_finite)
        left_out = 0 < in_a_row <= self._guard.non_finite
        if not left_out and (in_a_row or not finite):
            found = f"loss {loss} and gradient norm {grad_norm}"
            if finite:
                found += " and an update that is not finite"
            if in_a_row > 1:
                found += f", {in_a_row} such steps in a row"
            raise DivergenceError(
                f"step {step}: found {found}, expected finite numbers: try a lower "
                "--optimizer.learning-rate; earlier checkpoints are kept"
            )
        tokens_per_second = self._tokens_per_step / seconds
        mfu = None
        if self._peak_flops is not None:
            mfu = tokens_per_second * self._flops_per_token / self._peak_flops
        line: dict[str, Any] = {
            "step": step,
            "loss": finite_or_none(loss),
            "z_loss": finite_or_none(float(values.z_loss)),
            "grad_norm": finite_or_none(grad_norm),
            "learning_rate": float(self._learning_rate(step - 1)),
            "num_tokens": int(values.num_tokens),
            "seconds": seconds,
            "data_wait": data_wait,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
        }
        if statistics is not None:
            line["statistics"] = statistics_record(jax.device_get(statistics))
        self._record(line)
        if finite:
            self._display.step(line, self._steps)
        if values.guard is not None:
            self._report_guard(step, values)
        self.stopping = self.stopping or bool(jax.device_get(stop))

    def _report_guard(self, step: int, metrics: Metrics) -> None:
        clips = self._guard.action in ("clip", "clip-layers")
        names = value_names(self._program.params, self._guard)
        event = guard_event(step, metrics, names, clips=clips)
        if event is None or self._batch_rows is None:
            return
        event["batch"] = self._batch_rows(step)
        self._record(event)
        self._display.say(in_words(event, float(metrics.loss), float(metrics.grad_norm)))
