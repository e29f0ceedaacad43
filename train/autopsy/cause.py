"""One entry of the ranked list of causes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from train.autopsy.documents import Piece


class Cause(NamedTuple):
    """One entry of the list.

    kind: "not finite", "document", "learning rate", "second moment", "layer", "checkpoint", "weight decay",
        "replay" or "earlier step".
    since: the step from which on it acts.
    surprise: in units of the run's own noise; infinite for what the run's own rules exclude.
    result: whether it may as well follow from something before it.
    detail: what it is about, for counterfactuals. pieces: of the documents that it is.
    """

    kind: str
    name: str
    since: int
    surprise: float
    evidence: list[str]
    result: bool = False
    detail: Any = None
    pieces: Sequence[Piece] = ()
