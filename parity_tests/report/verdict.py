"""Whether the derived tolerance holds: everything that must be no worse than the yardstick, as checks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parity_tests.report.metrics import TOLERANCE, Compared
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

    A mean loss is one number, and a ratio of two single errors is luck: it may be off by as much as the
    losses of the positions are, by root mean square, which bounds the error of their mean. A divergence
    grows with the square of the errors. A choice may differ where the yardstick's errors could have.
    """
    truth, ours, theirs = outputs.oracle, outputs.ours, outputs.theirs

    def losses(of: Predictions) -> float:
        return float(np.sqrt(np.mean(np.square(of.losses - truth.losses))))

    size = float(np.sqrt(np.mean(np.square(truth.losses))))
    rounding = unit * size / 2  # of the loss, which is given in the computation's dtype
    margin = 2 * TOLERANCE * outputs.theirs.worst
    chosen = (ours.top1 != truth.top1) & (outputs.margin > margin)
    made = [
        _worst("modules: worst rms error", modules),
        Check("logits: rms error", outputs.logits.ours.rms, outputs.logits.allowed),
        Check(
            "losses of positions: rms error", losses(ours), TOLERANCE * losses(theirs) + rounding
        ),
        Check("loss", abs(ours.loss - truth.loss), TOLERANCE * losses(theirs) + rounding),
        Check("mean KL", float(ours.kl.mean()), TOLERANCE**2 * float(theirs.kl.mean()) + unit**2),
        Check("choices that no rounding explains", float(chosen.sum()), 0.0),
    ]
    if parameters:
        made.append(_worst("gradients: worst rms error", parameters))
    return made


def _worst(what: str, compared: Sequence[Compared]) -> Check:
    """The one that is furthest beyond its own tolerance."""

    def excess(each: Compared) -> float:
        over = each.ours.rms / each.allowed
        return float("inf") if np.isnan(over) else over

    each = max(compared, key=excess)
    return Check(f"{what}, {each.name}", each.ours.rms, each.allowed)
