"""How many tokens the fused loss takes at a time."""

import math

from llama_jax.numerics.backend import target_platform

# For each chunk of C tokens the kernel's float32 gradient is read and written once, 8 H V bytes, beside
# matmuls of 6 C H V FLOPs. On a device of F FLOPs/s and B bytes/s that is 4 F / (3 B C) of the matmuls'
# time, whatever H and V are: 393 / C on an H100, 221 / C on a TPU v5p. Against it stands the memory of a
# chunk's logits. With a vocabulary of 128,256 the budgets give 2048 tokens on a GPU, where the next power
# of two would take 2 GiB more, and 1024 on a TPU. A CPU is fastest in its caches.
_BUDGETS = {"cpu": 1 << 27, "tpu": 1 << 30, "gpu": 1 << 31}

# rows of a tile of the matrix units of TPUs and GPUs
_TILE = 128


def default_chunk(vocab: int) -> int:
    """Tokens per chunk: a power of two for which the chunk's buffers stay within a byte budget.

    A chunk's logits and their gradients take about 8 bytes per token and vocabulary entry. The budget
    depends on the platform: 128 MiB on a CPU, 1 GiB on a TPU, 2 GiB on a GPU.

    >>> import jax
    >>> with jax.default_device(jax.devices("cpu")[0]):
    ...     default_chunk(32_000)
    512
    """
    budget = _BUDGETS.get(target_platform(), _BUDGETS["tpu"])
    return max(_TILE, 1 << int(math.log2(max(budget // (8 * vocab), 1))))


def chunk_size(requested: int | None, tokens: int, vocab: int) -> int:
    """Tokens per chunk for `tokens` in all: `requested`, or `default_chunk` made smaller.

    Of several chunks, the last is then about as full as the others.

    >>> import jax
    >>> with jax.default_device(jax.devices("cpu")[0]):
    ...     chunk_size(None, 1100, 32_000), chunk_size(512, 1100, 32_000)
    (384, 512)
    """
    if requested is not None:
        return min(requested, max(tokens, 1))
    chunks = -(-tokens // default_chunk(vocab))
    if chunks <= 1:
        return max(tokens, 1)
    even = -(-tokens // chunks)
    return -(-even // _TILE) * _TILE
