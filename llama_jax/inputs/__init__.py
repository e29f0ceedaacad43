"""Validation of what users pass to a model."""
