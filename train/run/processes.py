"""Several processes in one run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from llama_jax.formatting import first_line, printable
from train.options import DistributedOptions
from train.run.runtime_messages import summarize_messages

HEARTBEAT_SECONDS = 30
"""Without a sign of life for so long, a process counts as dead, and the runtime ends all others."""


def has_other_processes(options: DistributedOptions) -> bool:
    """Whether the run is one of several processes, as far as its options say."""
    return options.enabled or options.coordinator is not None


def join_processes(options: DistributedOptions, folder: Path) -> None:
    """Connect to the other processes of the run in `folder`, if there are any.

    From then on the death of any process ends all others.

    Raises:
        ValueError: the connection fails.
    """
    if not has_other_processes(options):
        return
    summarize_messages(f"start all again with: python -m train resume {printable(str(folder))}")
    # before the backend starts; other platforms have collectives of their own
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # it would take SIGTERM, which `train.run.stop` handles
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:
        raise ValueError(f"distributed: cannot be initialized ({first_line(error)})") from None


@contextmanager
def cause_told_by_runtime() -> Iterator[None]:
    """Within, an error of the backend in one of several processes waits for the runtime to name its cause.

    A process that dies first shows as a failed collective; the runtime then says which one it was, and
    ends this one.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1 and "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(HEARTBEAT_SECONDS + 15)
        raise
