"""Tests of `python -m train autopsy`."""
