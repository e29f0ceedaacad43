"""Codes of a few bits, and small floating-point numbers, unpacked."""

from functools import cache

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

# the values of E2M1 in the order of their bits
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def unpack(packed: Shaped[np.ndarray, "rows words"], bits: int) -> UInt8[np.ndarray, "rows codes"]:
    """Codes that lie bit by bit in rows of little-endian integers, the first in the lowest bits.

    Args:
        packed: integers of any size, C-contiguous.
        bits: 1 to 8; where it does not divide 8, the bits that are left at the end of a row make further
            codes, to be cut off.

    >>> unpack(np.array([[0x76543210]], np.int32), 4)
    array([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=uint8)
    """
    raw = packed.view(np.uint8)
    if bits == 8:
        return raw
    mask = np.uint8((1 << bits) - 1)
    if 8 % bits == 0:
        codes = np.empty((*raw.shape, 8 // bits), np.uint8)
        for place in range(8 // bits):
            np.right_shift(raw, np.uint8(place * bits), out=codes[..., place])
        codes &= mask
    else:
        # eight codes lie in as many bytes as a code has bits
        raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % bits)))
        groups = raw.reshape(len(raw), -1, bits)
        words = np.zeros((*groups.shape[:-1], 8), np.uint8)
        words[..., :bits] = groups
        wide = words.view(np.uint64)
        codes = np.empty((*groups.shape[:-1], 8), np.uint8)
        for place in range(8):
            codes[..., place] = (wide[..., 0] >> np.uint64(place * bits)).astype(np.uint8)
        codes &= mask
    return codes.reshape(len(raw), -1)


def float8(codes: Shaped[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Numbers of any 8-bit floating-point dtype as float32.

    >>> import ml_dtypes
    >>> float8(np.array([0.5, -448], ml_dtypes.float8_e4m3fn))
    array([   0.5, -448. ], dtype=float32)
    """
    if codes.shape and codes.shape[-1] % 2 == 0 and codes.flags.c_contiguous:
        # two at a time, which is twenty times as fast as a cast
        return _look_up(_pairs(codes.dtype), codes.view(np.uint16))
    return codes.astype(np.float32)


@cache
def _pairs(dtype: np.dtype) -> np.ndarray:
    """The float32 values of all pairs of codes, as 64-bit integers."""
    codes = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    return codes.astype(np.float32).view(np.uint64)


def float4(packed: UInt8[np.ndarray, "rows half"]) -> Float32[np.ndarray, "rows columns"]:
    """E2M1 numbers, two a byte with the first in the low bits, as float32.

    >>> float4(np.array([[0x71, 0x9A]], np.uint8))
    array([[ 0.5,  6. , -1. , -0.5]], dtype=float32)
    """
    return codebook(packed, E2M1, low_first=True)


def codebook(
    packed: UInt8[np.ndarray, "*rows half"], values: Float32[np.ndarray, "16"], *, low_first: bool
) -> Float32[np.ndarray, "*rows columns"]:
    """4-bit codes, two a byte, looked up in a table."""
    codes = np.arange(256)
    halves = (codes & 15, codes >> 4) if low_first else (codes >> 4, codes & 15)
    table = np.stack([values[half] for half in halves], axis=-1)
    return _look_up(table.view(np.uint64)[:, 0], packed)


def _look_up(pairs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The two float32 numbers that each code stands for; the table has all codes of their dtype."""
    # indexing would take three times as long: it converts the indices itself and checks their range
    return np.take(pairs, codes.astype(np.intp), mode="wrap").view(np.float32)


def exponents(codes: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Powers of two as E8M0 has them: 2 ** (code - 127), and NaN for 255.

    >>> exponents(np.array([127, 128, 120], np.uint8))
    array([1.       , 2.       , 0.0078125], dtype=float32)
    """
    powers = np.ldexp(np.float32(1), codes.astype(np.int32) - 127)
    return np.where(codes == 255, np.float32(np.nan), powers).astype(np.float32)
