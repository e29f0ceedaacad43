"""Numerical building blocks that do not depend on a model.

`matmul` accumulates in float32, forward and backward, on a CPU by the kernels of `many_rows` and
`few_rows` where these suit; `rope` and `activations` are transformers'
functions; `remat` chooses what a layer keeps for its backward pass, from the names in `remat_policy`.
`backend` tells the platform that a program is compiled for, `scalars` turns what callers pass into plain
numbers.
"""
