"""Compile the step while the state is read."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import jax

from train.program.build import Program


@contextmanager
def compiling(program: Program, step: jax.stages.Wrapped, dropout_key: Any) -> Iterator[None]:
    """Within, another thread compiles `step`, or reads it from the cache of compiled programs.

    JAX then finds it when the step is called. Reading a checkpoint waits for the disk and for the devices,
    tracing a step does not. Several processes, of which each may fail, do without.
    """
    arguments = program.params, program.opt_state, program.batch, dropout_key

    def run() -> None:
        # what fails here fails again, where it is reported, when the step is called
        with suppress(Exception), jax.set_mesh(program.mesh):
            step.lower(*arguments).compile()

    if jax.process_count() > 1:
        yield
        return
    thread = Thread(target=run, name="compile the step")
    thread.start()
    try:
        yield
    finally:
        thread.join()
