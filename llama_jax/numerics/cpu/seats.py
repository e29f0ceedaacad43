"""Where threads wait for the next job, in memory that a symbol of LLVM's has the address of."""

import ctypes

from llvmlite import binding

SYMBOL = "llama_jax_seats"
SEATS, SEAT_BYTES = 8, 64  # a cache line each


def _lasting_zeros(size: int) -> int:
    """The address of so many bytes, which are never freed: threads may outlive Python's objects."""
    calloc = ctypes.CDLL(None).calloc
    calloc.restype, calloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t, ctypes.c_size_t)
    address: int = calloc(1, size)
    return address


binding.add_symbol(SYMBOL, _lasting_zeros(SEATS * SEAT_BYTES))
