"""Tests of `train.hardware`."""
