"""Two orders of the rows of query and key projections.

A rotary embedding turns pairs of a head's features. Hugging Face pairs feature i with i + D/2, Meta and
llama.cpp pair 2i with 2i + 1; so a head's rows (2, D/2) of the one are the rows (D/2, 2) of the other.
Queries have as many heads as the model, keys only as many as there are key/value heads.
"""

import numpy as np


def to_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows in Meta's order [heads * D, ...] put into Hugging Face's."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def to_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows in Hugging Face's order [heads * D, ...] put into Meta's."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
