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
    """Bytes of RAM that this process has, without pages of files, which come and go.

    None where the system does not say.
    """
    try:
        _, resident, of_files, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return None
    return (int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")
