"""Tests of `train.run`; `recorded_run` is `python -m train` that records its tokens."""
