"""Where the time until the first step of a run goes.

One clock for the process, as there is one start: `restart` at its beginning, `lap` at the end of each part.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from llama_jax.cli.startup import with_garbage_collection

_COMPILING = {
    "jaxpr_trace_duration": "tracing",
    "jaxpr_to_mlir_module_duration": "lowering",
    "backend_compile_duration": "compilation",
}
"""JAX's events, and what they are called here."""

_started: tuple[float, float] | None = None  # wall clock, processor time
_last = (0.0, 0.0)
_parts: dict[str, float] = {}


def restart() -> None:
    """Begin to measure."""
    global _started, _last
    _started = _last = _now()
    _parts.clear()


def lap(name: str) -> None:
    """Add the time since the last lap to a part."""
    global _last
    now = _now()
    _parts[name] = _parts.get(name, 0.0) + now[0] - _last[0]
    _last = now


@contextmanager
def first_step(name: str) -> Iterator[None]:
    """Within, the jitted function `name` is called for the first time, and its result waited for.

    What JAX does for it then become parts of their own: tracing, lowering, and compilation, which includes
    reading the program from the cache. The rest is the step itself.
    """
    from jax import monitoring

    measured: dict[str, float] = {}

    def listen(event: str, duration_secs: float, **facts: str | int) -> None:
        part = _COMPILING.get(event.rpartition("/")[2])
        # functions that it calls are measured as well, within it
        if part is not None and name in str(facts.get("fun_name", "")):
            measured[part] = max(measured.get(part, 0.0), duration_secs)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)
        with_garbage_collection()
    lap("first step")
    _parts["first step"] -= sum(measured.values())
    _parts.update(measured)


def parts() -> dict[str, float]:
    """Seconds of each part, and until the last lap: "total", and "processor" of all threads.

    Empty if not measured.
    """
    if _started is None:
        return {}
    total, processor = (last - first for last, first in zip(_last, _started, strict=True))
    return _parts | {"total": total, "processor": processor}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def in_words(parts: dict[str, float]) -> str:
    """The parts as a line for the terminal."""
    named = {name: seconds for name, seconds in parts.items() if name not in ("total", "processor")}
    return (
        f"first step after {parts['total']:.1f} s ({parts['processor']:.1f} s of processor time): "
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in named.items())
    )
