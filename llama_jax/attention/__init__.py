"""Grouped-query attention and the key/value cache.

`dispatch.attention` picks an implementation and runs it on every shard: `plain` holds the scores,
`blocked` never does, `cudnn` and `triton` are kernels for GPUs, `splash` is one for TPUs; `implementation`
has their names. `masks` says who attends to whom, `cache` keeps keys and values between calls.
"""
