"""The verdict: every error that must stay within the tolerance, as a check."""

from collections.abc import Sequence
from typing import NamedTuple

from parity_tests.reference.tolerances import ROUNDING_RATIO
from parity_tests.report.measure.metrics import Comparison, by_layer_group, pooled
from parity_tests.report.measure.outputs import Outputs, Predictions


class Check(NamedTuple):
    """An error and the largest that is allowed. Holds where `measured` is at most `allowed`; NaN never is.

    metric: what kind of error it is. what: the error in words.
    """

    metric: str
    what: str
    measured: float
    allowed: float

    @property
    def holds(self) -> bool:
        return bool(self.measured <= self.allowed)


_METRICS = {"lm_head": "logits", "loss": "loss"}  # the other modules' is "modules"


def checks(
    modules: Sequence[Comparison], outputs: Outputs, gradients: Sequence[Comparison], eps: float
) -> list[Check]:
    """All checks; the report holds, and its exit code is 0, if every one holds.

    A KL divergence grows with the square of the errors. A top-1 token may differ where their errors could
    have changed it.
    """
    exact, ours, theirs = outputs.oracle, outputs.ours, outputs.theirs

    def loss_error(program: Predictions) -> float:
        return pooled(program.losses - exact.losses)

    allowed_losses = ROUNDING_RATIO * loss_error(theirs) + eps * pooled(exact.losses) / 2
    allowed_kl = ROUNDING_RATIO**2 * float(theirs.kl.mean()) + eps**2
    explained = 2 * ROUNDING_RATIO * theirs.max_error
    changes = (ours.top1 != exact.top1) & (outputs.margin > explained)
    return [
        *(
            Check(
                _METRICS.get(group.name, "modules"),
                f"rms error of {group.name}",
                group.ours,
                group.allowed,
            )
            for group in by_layer_group(modules)
        ),
        Check("losses", "rms error of per-token losses", loss_error(ours), allowed_losses),
        Check("KL", "mean KL divergence", float(ours.kl.mean()), allowed_kl),
        Check("top-1", "top-1 changes beyond rounding", float(changes.sum()), 0.0),
        *(
            Check(
                "gradients", f"rms error of the gradient of {group.name}", group.ours, group.allowed
            )
            for group in by_layer_group(gradients)
        ),
    ]
