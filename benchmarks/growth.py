"""How time and memory grow with the samples, and what planning a million costs.

n = 5, 10, 20, 40 thousand at S = 7,500 under one budget, which the smallest fills already:
top-30 and the dense kernel; the exponent of time (bar 2.1), and the spread of peak memory (bar
15%). Run: ``python benchmarks/growth.py [--small]``.
"""

from __future__ import annotations

import shutil
import time
from typing import Any

import numpy as np
from measure import FOLDER, arguments, compare, losses, main, open_losses, timed


def top(path: str, memory: str) -> dict[str, Any]:
    import lkarray as lk

    x = open_losses(path)
    found = timed(lambda: lk.neighbors(x, 30, precision="float32", memory=memory).compute())
    return found | {"value": None}


def dense(path: str, memory: str) -> dict[str, Any]:
    import lkarray as lk

    out = FOLDER / "growth.zarr"
    shutil.rmtree(out, ignore_errors=True)
    found = timed(lambda: lk.save(lk.correlation(open_losses(path), memory=memory), out))
    shutil.rmtree(out)
    return found | {"value": None}


WAYS = {"top-30": top, "dense": dense}


def million() -> None:
    """Plan the top-30 of a million samples with 7,500 draws."""
    import dask.array as da
    import xarray as xr

    import lkarray as lk

    data = da.zeros((15, 500, 1_000_000), dtype="f4", chunks=(1, 100, 8192))
    x = xr.DataArray(data, dims=("chain", "draw", "sample"), name="loss")
    began = time.perf_counter()
    near = lk.neighbors(x, 30, memory="8 GiB", precision="float32")
    plan = lk.plan(near)
    seconds = time.perf_counter() - began
    print(f"a million samples: planned in {seconds:.2f} s (bar 5), {plan.tasks} tasks (bar 10,000)")
    print(plan)
    assert plan.tasks < 10_000


def report() -> None:
    asked = arguments(__doc__)
    if main(WAYS, asked):
        return
    sizes = (500, 1000, 2000) if asked.small else (5_000, 10_000, 20_000, 40_000)
    memory = "64 MiB" if asked.small else "256 MiB"
    rows: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for n in sizes:
        path = str(losses(n, 4, 25) if asked.small else losses(n, 15, 500))
        found = compare(list(WAYS), {"path": path, "memory": memory}, 1)
        for way, result in found.items():
            rows[way].append((result["seconds"], result["mib"]))
            print(f"{way:8s} n = {n:6d} {result['seconds']:8.2f} s {result['mib']:6.0f} MiB")
    for way, result_list in rows.items():
        seconds, peaks = np.array(result_list).T
        steps = np.diff(np.log(seconds)) / np.diff(np.log(sizes))
        fit = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        spread = peaks / np.median(peaks) - 1
        print(f"{way}: time grows as n^{fit:.2f} (last step n^{steps[-1]:.2f}; bar 2.1)")
        print(
            f"  peaks within {spread.max():+.0%} and {spread.min():+.0%} of their median (bar 15%)"
        )
    million()


if __name__ == "__main__":
    report()
