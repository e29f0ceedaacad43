"""Grouped-query attention and the key/value cache.

`dispatch.attention` picks an implementation and runs it on every shard: `plain` holds the scores,
`blocked` never does, `cudnn` and `splash` are kernels for GPU and TPU; `implementation` has their names.
`masks` says who attends to whom, `cache` keeps keys and values between calls.
"""
