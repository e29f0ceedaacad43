"""Log-probabilities of tokens. The public name of `llama_jax.evaluation.scoring`."""

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
