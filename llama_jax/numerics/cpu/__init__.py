"""Matmuls of few rows on a CPU, compiled by numba and called by XLA; needs the extra `cpu`."""
