"""How much memory there is."""

from pathlib import Path


def available_memory() -> int | None:
    """Bytes of RAM that a new program can use without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available.split()[1]) * 1024
