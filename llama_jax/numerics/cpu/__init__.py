"""Kernels for a CPU, of a decoding step and of matmuls of many rows, compiled by numba (extra `cpu`)."""
