"""Whether the derived tolerance holds: everything that must be no worse than the yardstick, as checks."""

from collections.abc import Sequence
from typing import NamedTuple

from parity_tests.report.metrics import TOLERANCE, Compared, kinds, pooled
from parity_tests.report.outputs import Outputs, Predictions


class Check(NamedTuple):
    """found, allowed: errors of `what`. Holds where found is at most allowed; NaN never is."""

    what: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.found <= self.allowed


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

    rounding = unit * pooled(truth.losses) / 2
    margin = 2 * TOLERANCE * outputs.theirs.worst
    chosen = (ours.top1 != truth.top1) & (outputs.margin > margin)
    return [
        *(Check(f"{kind.name}: rms error", kind.ours, kind.allowed) for kind in kinds(modules)),
        Check(
            "losses of positions: rms error", losses(ours), TOLERANCE * losses(theirs) + rounding
        ),
        Check("mean KL", float(ours.kl.mean()), TOLERANCE**2 * float(theirs.kl.mean()) + unit**2),
        Check("choices that no rounding explains", float(chosen.sum()), 0.0),
        *(Check(f"gradient of {kind.name}", kind.ours, kind.allowed) for kind in kinds(parameters)),
    ]
