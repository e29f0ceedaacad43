"""How long two programs generate the same tokens greedily, where both models fit into memory."""

from typing import NamedTuple

import numpy as np

from parity_tests.report.programs.program import CanGenerate

PROMPT, NEW = 32, 64  # tokens


class Greedy(NamedTuple):
    """The first `identical` of `generated` new tokens are the same in both."""

    identical: int
    generated: int


def greedy(ours: CanGenerate, theirs: CanGenerate, ids: np.ndarray) -> Greedy:
    """Both continue the first tokens of `ids` [1, T], until they stop or have generated `NEW`."""
    prompt = ids[:, : max(1, min(PROMPT, ids.shape[1] // 2))]
    our_tokens, their_tokens = (
        program.generate(prompt, NEW)[0, prompt.shape[1] :] for program in (ours, theirs)
    )
    common = min(len(our_tokens), len(their_tokens))
    differs = np.flatnonzero(our_tokens[:common] != their_tokens[:common])
    identical = int(differs[0]) if differs.size else common
    return Greedy(identical, max(len(our_tokens), len(their_tokens)))
