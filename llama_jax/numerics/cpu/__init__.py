"""Kernels of a decoding step on a CPU, compiled by numba and called by XLA; they need the extra `cpu`."""
