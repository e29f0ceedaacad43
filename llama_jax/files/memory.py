"""How much memory there is, and how much of it is this process's."""

import os
from pathlib import Path


def available_memory() -> int | None:
    """Bytes of RAM that a new program can use without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available.split()[1]) * 1024


def resident_memory() -> int | None:
    """Bytes of RAM that this process has; None where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
