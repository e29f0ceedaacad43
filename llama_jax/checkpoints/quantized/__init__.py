"""Weights that other programs quantized, dequantized tensor by tensor as they are read.

`detect` finds the scheme in config.json; there is one module a scheme, with pure functions from a few
stored arrays to one float32 array; `weights` puts a checkpoint's tensors together to weights, with what
is in `scheme`. Everything is computed in float32 by the scheme's own formula, whatever the dtype of its
scales: rounded to that dtype, it is what the program that defines the scheme computes.
"""
