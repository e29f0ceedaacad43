"""Validation of what users pass to a model: token `ids`, `labels`, `positions` and PRNG `keys`."""
