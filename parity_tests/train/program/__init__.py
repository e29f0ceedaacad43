"""Tests of `train.program`; `sharded_optimizer` runs with eight host devices."""
