"""Learning-rate schedules by name: a warmup, then cosine, linear, constant, or wsd.

"wsd" (warmup, stable, decay) is arXiv:2404.06395.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Schedule = Literal["cosine", "linear", "wsd", "constant"]


def learning_rate_schedule(
    name: Schedule,
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    final_fraction: float,
    decay_fraction: float,
) -> Callable[[Float[Array, ""] | int], Float[Array, ""]]:
    """The learning rate of each step, counted from 0.

    Step i of the warmup has peak * (i + 1) / warmup_steps, so no step is lost on a rate of 0. Then
    "cosine" and "linear" fall to peak * final_fraction at `steps`; "wsd" (warmup, stable, decay,
    arXiv:2404.06395) stays at the peak and falls linearly over the last `decay_fraction` of all steps;
    "constant" stays.
    """
    final = peak * final_fraction
    rest = max(steps - warmup_steps, 1)
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=final_fraction)
    elif name == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif name == "wsd":
        decay = max(round(steps * decay_fraction), 1)
        after = optax.linear_schedule(peak, final, decay, transition_begin=max(rest - decay, 0))
    elif name == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise ValueError(f"schedule: found {name!r}, expected cosine, linear, wsd or constant")
    schedule = after
    if warmup_steps > 0:
        warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
        schedule = optax.join_schedules([warmup, after], [warmup_steps])
    return lambda step: jnp.asarray(schedule(jnp.asarray(step, float)), float)
