"""Dense correlation from Zarr to Zarr, against the in-memory product and against peers.

The floor loads the Zarr, centres, scales and multiplies ``x.T @ x`` in memory with all BLAS
threads, and writes nothing. n = 10,000 samples, 15 chains x 500 draws. Run:
``python benchmarks/dense.py [--small]``.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
from measure import FOLDER, arguments, compare, losses, main, open_losses, table, timed

BARS = {
    "lkarray": 1.1,
    "lkarray, 2 processes": 1.3,
    "lkarray, precision auto": 0.85,
}


def standardised(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, x.shape[-1])
    x -= x.mean(0)
    x /= np.linalg.norm(x, axis=0)
    return x


def floor(path: str, **_: Any) -> dict[str, Any]:
    import xarray as xr

    def work() -> list[list[float]]:
        x = standardised(xr.open_zarr(path, consolidated=False, chunks=None)["loss"].values)
        return (x.T @ x)[::97, ::101][:40, :40].tolist()

    return timed(work)


def ours(path: str, memory: str, precision: str = "float32") -> dict[str, Any]:
    import lkarray as lk

    if precision == "auto":
        import torch  # noqa: F401  # as in any process that samples
    out = FOLDER / f"kernel-{precision}.zarr"
    shutil.rmtree(out, ignore_errors=True)

    def work() -> list[list[float]]:
        kernel = lk.correlation(open_losses(path), memory=memory, precision=precision)
        return lk.save(kernel, out)

    run = timed(work)
    run["value"] = run["value"][::97, ::101][:40, :40].values.tolist()
    return run


def processes(path: str, memory: str) -> dict[str, Any]:
    from distributed import Client, LocalCluster

    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "1GiB"}
    with LocalCluster(dashboard_address=None, **options) as cluster, Client(cluster) as client:
        client.run(lambda: __import__("lkarray.saving"))
        return ours(path, "700 MiB" if memory == "1 GiB" else memory)


def automatic(path: str, memory: str) -> dict[str, Any]:
    return ours(path, memory, "auto")


def dask_corrcoef(path: str, memory: str) -> dict[str, Any]:
    import dask.array as da

    x = open_losses(path).data
    flat = x.reshape(-1, x.shape[-1]).T
    return timed(lambda: da.corrcoef(flat).compute()[::97, ::101][:40, :40].tolist())


def xarray_dot(path: str, memory: str) -> dict[str, Any]:
    import xarray as xr

    x = open_losses(path)
    x = x - x.mean(("chain", "draw"))
    x = x / ((x**2).sum(("chain", "draw"))) ** 0.5
    other = x.rename(sample="sample_2").drop_vars(("label", "sample_2"), errors="ignore")
    return timed(
        lambda: (
            xr.dot(x, other, dim=("chain", "draw")).compute()[::97, ::101][:40, :40].values.tolist()
        )
    )


WAYS = {
    "floor": floor,
    "lkarray": ours,
    "lkarray, 2 processes": processes,
    "lkarray, precision auto": automatic,
    "dask.array.corrcoef": dask_corrcoef,
    "xarray.dot": xarray_dot,
}


def monte_carlo_error(path: str, rows: int = 60) -> float:
    """Return the median standard error of R, deleting one chain at a time, over some rows."""
    x = open_losses(path)[:, :, :rows].values.astype(np.float64)
    chains = len(x)
    left = []
    for c in range(chains):
        rest = standardised(np.delete(x, c, axis=0))
        left.append(rest.T @ rest)
    spread = np.stack(left).var(0) * (chains - 1)
    return float(np.median(np.sqrt(spread[np.triu_indices(rows, 1)])))


def report() -> None:
    asked = arguments(__doc__)
    if main(WAYS, asked):
        return
    n, chains, draws = (600, 15, 40) if asked.small else (10_000, 15, 500)
    path = str(losses(n, chains, draws))
    memory = "64 MiB" if asked.small else "1 GiB"
    peers = ("dask.array.corrcoef", "xarray.dot")
    repeats = 1 if asked.small else asked.repeats
    runs = compare(list(WAYS), {"path": path, "memory": memory}, repeats, once=peers)
    table(runs, "floor", BARS)
    mine = runs["lkarray"]["seconds"]
    for peer, bar in zip(peers, (6, 20), strict=True):
        ratio = runs[peer]["seconds"] / mine
        print(f"{peer} takes {ratio:.1f} times as long as lkarray (bar {bar})")
    reference = np.array(runs["floor"]["value"])
    for way in WAYS:
        error = np.abs(np.array(runs[way]["value"]) - reference)
        assert error.max() < (5e-3 if "auto" in way else 1e-4), (way, error.max())
    error = np.abs(np.array(runs["lkarray, precision auto"]["value"]) - reference)
    print(
        f"precision auto: error {np.sqrt((error**2).mean()):.1e} rms, {error.max():.1e} at most; "
        f"Monte-Carlo error of an entry {monte_carlo_error(path):.1e} (median, deleting chains)"
    )


if __name__ == "__main__":
    report()
