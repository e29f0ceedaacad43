"""Whether the derived tolerance holds: everything that must be no worse than the yardstick, as checks."""

from collections.abc import Sequence
from typing import NamedTuple

from parity_tests.reference.tolerances import ROUNDING_RATIO
from parity_tests.report.metrics import Compared, kinds, pooled
from parity_tests.report.outputs import Outputs, Predictions


class Check(NamedTuple):
    """found, allowed: errors of `what`. Holds where found is at most allowed; NaN never is.

    metric: the kind of figure that `what` is one of.
    """

    metric: str
    what: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        return bool(self.found <= self.allowed)


_METRICS = {"lm_head": "logits", "loss": "loss"}


def checks(
    modules: Sequence[Compared], outputs: Outputs, parameters: Sequence[Compared], unit: float
) -> list[Check]:
    """What the exit code stands on.

    A divergence grows with the square of the errors. A choice may differ where the yardstick's errors
    could have made it.
    """
    truth, ours, theirs = outputs.oracle, outputs.ours, outputs.theirs

    def losses(of: Predictions) -> float:
        return pooled(of.losses - truth.losses)

    bound = ROUNDING_RATIO * losses(theirs) + unit * pooled(truth.losses) / 2
    margin = 2 * ROUNDING_RATIO * outputs.theirs.worst
    chosen = (ours.top1 != truth.top1) & (outputs.margin > margin)
    rms = "rms error"
    return [
        *(
            Check(
                _METRICS.get(kind.name, "modules"), f"{rms} of {kind.name}", kind.ours, kind.allowed
            )
            for kind in kinds(modules)
        ),
        Check("losses", f"{rms} of positions' losses", losses(ours), bound),
        Check(
            "KL",
            "mean KL",
            float(ours.kl.mean()),
            ROUNDING_RATIO**2 * float(theirs.kl.mean()) + unit**2,
        ),
        Check("top-1", "choices that no rounding explains", float(chosen.sum()), 0.0),
        *(
            Check("gradients", f"{rms} of the gradient of {kind.name}", kind.ours, kind.allowed)
            for kind in kinds(parameters)
        ),
    ]
