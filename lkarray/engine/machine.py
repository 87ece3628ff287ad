"""The memory of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that it runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total
