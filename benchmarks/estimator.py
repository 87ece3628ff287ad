"""Kernels of losses from outcomes taken as Gaussian, against those from losses: seconds of each.

    python benchmarks/estimator.py [--small]

The same correlations and neighbours by `estimator="sample"` and `"gaussian"`, of outcomes at
1,000 draws: the difference is a series of each entry. Interleaved in one process, medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from measure import arguments

_BAR = 1.5


def log_odds(n: int, draws: int, seed: int = 0) -> xr.DataArray:
    """Return log-odds of inputs of which most are sure, in four chains."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((draws, 50), dtype=np.float32)
    values = shared @ (0.3 * rng.standard_normal((50, n), dtype=np.float32))
    values += rng.standard_normal(values.shape, dtype=np.float32)
    values *= rng.uniform(0.2, 1.5, n).astype(np.float32)
    values += rng.normal(-4, 3, n).astype(np.float32)
    dims = ("chain", "draw", "sample")
    attrs = {"link": "softplus"}
    return xr.DataArray(values.reshape(4, -1, n), dims=dims, name="log_odds", attrs=attrs)


def correlation(x: xr.DataArray, estimator: str) -> Any:
    """Make every tile, and keep a corner of each."""
    import lkarray as lk

    tiles = lk.correlation(x, estimator=estimator).data
    return tiles.map_blocks(lambda tile: tile[:1, :1], chunks=(1, 1)).compute()


def neighbors(x: xr.DataArray, estimator: str) -> Any:
    """Search with products in float32, as both estimators can."""
    import lkarray as lk

    return lk.neighbors(x, 30, estimator=estimator, precision="float32").compute()


def seconds(
    work: Callable[[xr.DataArray, str], Any], x: xr.DataArray, repeats: int
) -> dict[str, float]:
    """Return the medians of both estimators, taken in turns."""
    taken: dict[str, list[float]] = {"sample": [], "gaussian": []}
    for _ in range(repeats + 1):  # the first starts threads and touches memory
        for estimator, own in taken.items():
            began = time.perf_counter()
            work(x.copy(), estimator)
            own.append(time.perf_counter() - began)
    return {estimator: statistics.median(own[1:]) for estimator, own in taken.items()}


def main() -> None:
    """Print a line for each function."""
    asked = arguments(__doc__)
    n, draws = (300, 100) if asked.small else (6_000, 1_000)
    x = log_odds(n, draws)
    print(f"{n} samples, {draws} draws")
    for work in (correlation, neighbors):
        own = seconds(work, x, asked.repeats)
        ratio = own["gaussian"] / own["sample"]
        met = "met" if ratio <= _BAR else "NOT met"
        times = f"sample {own['sample']:6.2f} s, gaussian {own['gaussian']:6.2f} s"
        print(f"{work.__name__:12s} {times}, ratio {ratio:.2f}  bar {_BAR}: {met}")


if __name__ == "__main__":
    main()
