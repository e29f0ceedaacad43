"""Tests of `train.data`."""
