"""Top-30 neighbours, against the operations they need and against numpy in memory.

n = 50,000 and S = 7,500: seconds against n**2 S operations at the rate of float32 products
measured in the same run. n = 10,000: against numpy's product and argpartition in memory,
loaded from the same Zarr. Run: ``python benchmarks/top_k.py [--small]``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from measure import arguments, compare, losses, main, open_losses, table, timed


def rate(path: str = "", memory: str = "") -> dict[str, Any]:
    """Float32 operations a second: products of panels of 2,048, all BLAS threads."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((7500, 2048), dtype=np.float32) for _ in range(2))
    taken = []
    for _ in range(9):
        began = time.perf_counter()
        _ = a.T @ b
        taken.append(time.perf_counter() - began)
    seconds = statistics.median(taken)
    return {"seconds": seconds, "mib": 0, "value": 2 * 7500 * 2048**2 / seconds}


def neighbours(path: str, memory: str, precision: str) -> dict[str, Any]:
    import lkarray as lk

    if precision == "auto":
        import torch  # noqa: F401  # as in any process that samples
    x = open_losses(path)
    run = timed(lambda: lk.neighbors(x, 30, precision=precision, memory=memory).compute())
    run["value"] = [
        run["value"]["neighbor"][::97][:100].values.tolist(),
        run["value"]["similarity"][::97][:100].values.tolist(),
        run["value"].attrs["precision"],
    ]
    return run


def exact(path: str, memory: str) -> dict[str, Any]:
    return neighbours(path, memory, "float32")


def automatic(path: str, memory: str) -> dict[str, Any]:
    return neighbours(path, memory, "auto")


def in_memory(path: str, memory: str) -> dict[str, Any]:
    import xarray as xr

    def work() -> list[Any]:
        x = xr.open_zarr(path, consolidated=False, chunks=None)["loss"].values
        x = x.reshape(-1, x.shape[-1])
        x -= x.mean(0)
        x /= np.linalg.norm(x, axis=0)
        r = x.T @ x
        np.fill_diagonal(r, -np.inf)
        best = np.argpartition(-r, 30, axis=1)[:, :30]
        value = np.take_along_axis(r, best, 1)
        order = np.argsort(-value, axis=1)
        best, value = np.take_along_axis(best, order, 1), np.take_along_axis(value, order, 1)
        return [best[::97][:100].tolist(), value[::97][:100].tolist(), "float32"]

    return timed(work)


WAYS = {"rate": rate, "float32": exact, "auto": automatic, "numpy": in_memory}


def check(runs: dict[str, dict[str, Any]], ways: tuple[str, ...]) -> None:
    """Equal neighbours, up to ties within float32 rounding."""
    first = runs[ways[0]]["value"]
    for way in ways[1:]:
        other = runs[way]["value"]
        np.testing.assert_allclose(other[1], first[1], atol=5e-6)
        same = (np.array(first[0]) == np.array(other[0])).mean()
        assert same > 0.99, (way, same)


def report() -> None:
    asked = arguments(__doc__)
    if main(WAYS, asked):
        return
    repeats = 1 if asked.small else asked.repeats
    n, draws = (800, 40) if asked.small else (10_000, 500)
    path, memory = str(losses(n, 15, draws)), "64 MiB" if asked.small else "1500 MiB"
    runs = compare(["numpy", "float32", "auto"], {"path": path, "memory": memory}, repeats)
    print(f"n = {n}")
    table(runs, "numpy", {"float32": 1.0, "auto": 1.0})
    check(runs, ("numpy", "float32", "auto"))

    n, draws = (1500, 40) if asked.small else (50_000, 500)
    path, memory = str(losses(n, 15, draws)), "64 MiB" if asked.small else "2600 MiB"
    options = {"path": path, "memory": memory}
    runs = compare(["rate", "float32", "auto"], options, 1)
    speed = runs.pop("rate")["value"]
    print(f"n = {n}, float32 products at {speed / 1e9:.0f} GFLOP/s")
    operations = n**2 * 15 * draws
    floor = {"n^2 S operations": {"seconds": operations / speed, "mib": 0, "value": None}}
    table(floor | runs, "n^2 S operations", {"float32": 1.4, "auto": 0.7})
    print(f"auto used {runs['auto']['value'][2]}")
    check(runs, ("float32", "auto"))


if __name__ == "__main__":
    report()
