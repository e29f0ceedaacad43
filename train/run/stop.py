"""SIGTERM, SIGUSR1 and SIGINT ask a run to save and end; all processes agree on the step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RESUME = 75
"""The exit code of a run that was stopped like this: the EX_TEMPFAIL of sysexits.h, try again."""

_SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within, SIGUSR1 does what SIGTERM does: before the first step there is nothing to save."""
    previous = signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, `stop_requested()` says whether a signal has come. A second SIGINT interrupts at once."""
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def agreement(mesh: Mesh) -> Callable[[bool], jax.Array]:
    """`any_process(flag)`: whether the flag is set in any process, as a device array.

    It is computed on the devices like the metrics of a step, so asking after every step costs no wait;
    reading the array does.
    """
    per_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    maximum = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def any_process(flag: bool) -> jax.Array:
        local = np.full(len(mesh.local_devices), flag)
        return maximum(jax.make_array_from_process_local_data(per_device, local))

    return any_process
