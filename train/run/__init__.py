"""A run: its loop, checkpoints, lock and signals."""
