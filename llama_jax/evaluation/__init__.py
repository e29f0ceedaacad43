"""Scores of given tokens, and how far one model is from another."""
