"""Work for a process of its own, which loads no more than it needs."""

from __future__ import annotations

import numpy as np

from lkarray_workflows.shared import costs


def hungry(mebibytes: int) -> int:
    """Return by how many bytes the measured peak is off, of an array as large as that."""
    before = costs.peak_memory()
    held = np.ones(mebibytes << 17)
    return costs.peak_memory() - before - held.nbytes
