"""Lengths that programs are compiled for; what is shorter is padded to them."""

_LEAST = 16


def bucket(size: int) -> int:
    """At least 16, and at most an eighth more than `size`.

    >>> bucket(5), bucket(100), bucket(1000)
    (16, 112, 1024)
    """
    step = max(_LEAST, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


def padded_length(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, ...: fewer lengths than `bucket` has; at most a third is padding.

    >>> padded_length(5), padded_length(100), padded_length(1000)
    (16, 128, 1024)
    """
    size = _LEAST
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size
