"""Pages: what memory and files are mapped in, and what direct reading and writing of a disk takes."""

PAGE = 2**12  # bytes; of x86 and most others, and a multiple of a disk's blocks of 512 or 4096


def whole_pages(nbytes: int) -> int:
    """The number of bytes in as many pages as hold `nbytes`.

    >>> whole_pages(4097)
    8192
    """
    return -(-nbytes // PAGE) * PAGE
