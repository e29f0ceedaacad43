"""What the check asks of a Llama: to run one section at a time, each from the arrays that were recorded.

A section is the embedding, a decoder layer, or the head with the final norm and the loss. Every step reads
the recorded values of the steps before it where there are any, so that an error shows in the step that
makes it and in none after it.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

Values = Mapping[str, np.ndarray]
"""Arrays by the names of steps, see `names.py`."""


class Inputs(NamedTuple):
    """What the recorded model was called with, [B, T] each.

    num_items: what the sum of the loss is divided by; None for the number of labels that count.
    """

    ids: np.ndarray
    labels: np.ndarray | None = None
    attention_mask: np.ndarray | None = None
    position_ids: np.ndarray | None = None
    segment_ids: np.ndarray | None = None
    num_items: float | None = None

    @property
    def positions(self) -> np.ndarray:
        """int64 [B or 1, T]."""
        if self.position_ids is not None:
            return self.position_ids.astype(np.int64)
        return np.arange(self.ids.shape[1])[None]

    @property
    def targets(self) -> np.ndarray:
        """Labels, not shifted; those of no recorded labels are the ids."""
        return (self.ids if self.labels is None else self.labels).astype(np.int64)


class Sections(Protocol):
    """A Llama on a checkpoint's weights and a recording's inputs."""

    name: str
    """Shown in the verdict."""

    def forward(self, section: str, values: Values) -> dict[str, np.ndarray]:
        """Every step of a section.

        Args:
            section: see `names.sections`.
            values: what steps read in place of what earlier ones computed, and what the section reads of
                those before: hidden states and rotary angles.
        """

    def backward(self, section: str, values: Values, cotangents: Values) -> dict[str, np.ndarray]:
        """Gradients of a section.

        Args:
            values: as in `forward`.
            cotangents: gradients of the loss with respect to steps of the section. At each of them the
                backward pass begins anew, as steps do at recorded values.

        Returns:
            Gradients with respect to these steps, to the hidden states that the section reads, and to its
            parameters by their names in the checkpoint.
        """
