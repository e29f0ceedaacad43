"""Evaluation: `scoring` gives log-probabilities of tokens, `divergence` compares two models on a text."""
