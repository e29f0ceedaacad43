"""Learning-rate schedules by name: linear warmup, then cosine, linear, constant or wsd."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from train.options import Schedule

# which of the options `final_fraction` and `decay_fraction` a schedule uses
USES: dict[str, tuple[str, ...]] = {
    "cosine": ("final_fraction",),
    "linear": ("final_fraction",),
    "wsd": ("final_fraction", "decay_fraction"),
    "constant": (),
}


def learning_rate_schedule(
    name: Schedule,
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    final_fraction: float,
    decay_fraction: float,
) -> Callable[[Float[Array, ""] | int], Float[Array, ""]]:
    """The learning rate as a function of the step, from 0 to `steps` - 1.

    Step i of the warmup has peak * (i + 1) / warmup_steps, so that no step has a rate of 0. Then "cosine"
    and "linear" fall to peak * final_fraction at `steps`; "wsd" (warmup, stable, decay, arXiv:2404.06395)
    stays at the peak and falls linearly over the last `decay_fraction` of all steps; "constant" stays. As
    in optax and transformers the final value would be that of step `steps`: the last step is just above.

    Raises:
        ValueError: as `require_fit`.
    """
    require_fit(name, steps=steps, warmup_steps=warmup_steps, decay_fraction=decay_fraction)
    final = peak * final_fraction
    remaining = max(steps - warmup_steps, 1)
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, remaining, alpha=final_fraction)
    elif name == "linear":
        after = optax.linear_schedule(peak, final, remaining)
    elif name == "wsd":
        decay = _decay_steps(steps, decay_fraction)
        after = optax.linear_schedule(peak, final, decay, transition_begin=remaining - decay)
    else:
        after = optax.constant_schedule(peak)
    schedule = after
    if warmup_steps > 0:
        warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
        schedule = optax.join_schedules([warmup, after], [warmup_steps])
    return lambda step: jnp.asarray(schedule(jnp.asarray(step, float)), float)


def require_fit(name: Schedule, *, steps: int, warmup_steps: int, decay_fraction: float) -> None:
    """Raise ValueError for an unknown name, or if warmup and decay do not fit into `steps`."""
    if name not in USES:
        raise ValueError(f"schedule: found {name!r}, expected cosine, linear, wsd or constant")
    decay = _decay_steps(steps, decay_fraction) if name == "wsd" else 0
    # a constant schedule may end with its warmup; the others need steps to fall
    longest_warmup = steps if name == "constant" else steps - max(decay, 1)
    if warmup_steps <= longest_warmup:
        return
    if name == "wsd" and warmup_steps < steps:
        raise ValueError(
            f"optimizer.warmup-steps: found {warmup_steps}, and a decay of {decay} steps, expected at most "
            f"{steps} steps together: lower --optimizer.warmup-steps to {longest_warmup}, or "
            f"--optimizer.decay-fraction to {_fraction(steps, steps - warmup_steps)}"
        )
    raise ValueError(
        f"optimizer.warmup-steps: found {warmup_steps}, expected at most {longest_warmup} of {steps} steps "
        f"with the {name} schedule"
    )


def _decay_steps(steps: int, fraction: float) -> int:
    return max(round(steps * fraction), 1)


def _fraction(steps: int, longest: int) -> str:
    """A short decimal fraction whose decay has at most `longest` steps."""
    rounded = (f"{longest / steps:.{digits}g}" for digits in range(3, 17))
    return next(text for text in rounded if _decay_steps(steps, float(text)) <= longest)
