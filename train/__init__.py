"""The pretraining program: `python -m train`."""
