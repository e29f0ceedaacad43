"""Tests of `train.plan` and `train.hardware`; `planned` runs with eight host devices."""
