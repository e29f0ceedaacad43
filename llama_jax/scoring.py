"""Log-probabilities of given tokens; see `llama_jax.evaluation.scoring`, where this is from."""

from llama_jax.evaluation.scoring import (
    TokenScores,
    encode_pair,
    loglikelihood,
    loglikelihood_rolling,
    prefix_token,
    rolling_windows,
    token_scores,
)

__all__ = [
    "TokenScores",
    "encode_pair",
    "loglikelihood",
    "loglikelihood_rolling",
    "prefix_token",
    "rolling_windows",
    "token_scores",
]
