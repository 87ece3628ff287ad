"""What training costs, and what recording and auditing it cost, each in a process of its own."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lkarray as lk
from lkarray_workflows.shared.recorded import Trained, fit, logits_of, plan


def cost_of(
    run: Trained, options: dict[str, Any] | None, where: Path, *, audited: int, steps: int
) -> dict[str, float]:
    """Return what training costs, or with options of `lkarray.audit` recording it and auditing."""
    config = run.config
    data, test = run.images("train"), run.images("test", audited)
    model = run.untrained()
    logits_of(model, test.tensors[0][:2])
    before, began = peak_memory(), time.perf_counter()
    steps = min(steps, config.batches * config.epochs)
    batches = plan(len(data), config.batch_size, steps, run.seed)
    if options is None:
        fit(model, data, batches, config.learning_rate)
    else:
        with TemporaryDirectory(dir=where) as folder:
            fit(model, data, batches, config.learning_rate, store=Path(folder) / "train.zarr")
            trace = lk.open_trace(Path(folder) / "train.zarr", run.untrained(), data)
            lk.audit(trace, test, store=Path(folder) / "audit.zarr", **options)
    return {"seconds": time.perf_counter() - began, "gib": (peak_memory() - before) / 2**30}


def peak_memory() -> int:
    """Return the largest memory that this process has had, in bytes.

    Of Linux's own count: what `getrusage` says of a new process is what its parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
