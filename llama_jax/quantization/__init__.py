"""Weights in 8 or 4 bits: `model` quantizes and dequantizes models, `weight` a matrix."""
