"""Have the first step of a start compiled, or read from its file, while the state is read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread, get_ident
from typing import Any

import jax

from llama_jax.numerics.cpu.available import loaded_kernels
from train.options import RunOptions
from train.program.build import Program
from train.run.kept_step import keep_step, kept_step_file, load_step


class Ahead:
    """The step `name` of a program, of which another thread takes care.

    JAX finds what the thread has compiled when the step is called. Reading a checkpoint waits for the disk
    and for the devices, tracing a step does not. Several processes, of which each may fail, do without.

    Args:
        dropout_key: one for a step.
        must_trace: a step that was read from its file will not do.
        begin: whether the thread is to begin; otherwise JAX compiles the step when it is called.
    """

    def __init__(
        self,
        program: Program,
        options: RunOptions,
        name: str,
        dropout_key: Any,
        *,
        must_trace: bool,
        begin: bool,
    ) -> None:
        self._program, self._options, self._name = program, options, name
        self._dropout_key, self._must_trace = dropout_key, must_trace
        self._step: Callable[..., Any] = getattr(program, name)
        self._keep: Callable[[], None] = lambda: None
        self._thread: Thread | None = None
        if begin and jax.process_count() == 1:
            self._thread = Thread(target=self._run, name="compile the step")
            self._thread.start()

    def step(self) -> Callable[..., Any]:
        """The step, as soon as it can be called."""
        if self._thread is not None:
            self._thread.join()
        return self._step

    def keep(self) -> None:
        """Write the step for the next start if it was compiled for this one."""
        self._keep()

    def _run(self) -> None:
        # what fails here fails again, where it is reported, when the step is called
        with suppress(Exception), jax.set_mesh(self._program.mesh):
            self._read_or_compile()

    def _read_or_compile(self) -> None:
        program, key = self._program, self._dropout_key
        file = None
        if not self._must_trace:
            file = kept_step_file(program, self._options, self._name, key)
        if file is not None and (read := load_step(file, program)) is not None:
            self._step = read
            return
        step: jax.stages.Wrapped = getattr(program, self._name)
        with _counting_hits() as hits:
            compiled = step.lower(program.params, program.opt_state, program.batch, key).compile()
        # XLA cannot write a program again that it has read
        if file is not None and not hits:
            kernels = loaded_kernels()
            self._keep = lambda: keep_step(file, compiled, kernels)


@contextmanager
def _counting_hits() -> Iterator[list[str]]:
    """Within, the list has an item for each program that this thread read from JAX's cache."""
    hits: list[str] = []
    thread = get_ident()

    def listen(event: str, **_: str | int) -> None:
        if event.endswith("/cache_hits") and get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)
