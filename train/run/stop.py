"""SIGTERM and SIGINT ask a run to save and end; all processes hear of it at the same step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, `asked()` tells whether a signal came. A second SIGINT interrupts at once."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def agreement(mesh: Mesh) -> Callable[[bool], jax.Array]:
    """`any_of(mine)`: whether any process says True, as an array that is there when it is there.

    It is computed on the devices like a step's metrics, so that asking every step holds up nothing.
    """
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def any_of(mine: bool) -> jax.Array:
        local = np.full(len(mesh.local_devices), mine)
        return largest(jax.make_array_from_process_local_data(everywhere, local))

    return any_of
