"""Singular values of losses larger than the budget, and alignment of two kernels.

Top 50 of 100,000 x 7,500 (3 GB) under 2 GiB against ``dask.array.linalg.svd_compressed`` with
four power iterations (QR in between: without, float32 overflows), accuracy against float64 at a
smaller size; CKA of two tensors of n = 100,000, S = 2,000 under 1.5 GiB. Run:
``python benchmarks/spectra.py [--small]``.
"""

from __future__ import annotations

from typing import Any

import dask
import numpy as np
from measure import arguments, compare, losses, main, open_losses, table, timed


def ours(path: str, k: int, memory: str, keep: bool, other: str = "") -> dict[str, Any]:
    import lkarray as lk

    x = open_losses(path)
    run = timed(lambda: lk.svd(x, k, over=("chain", "draw"), memory=memory).compute())
    return kept(run, run["value"]["singular_value"].values, run["value"]["u"].values, keep)


def theirs(path: str, k: int, memory: str, keep: bool, other: str = "") -> dict[str, Any]:
    import dask.array as da

    x = open_losses(path).data
    matrix = x.reshape(-1, x.shape[-1]).T

    def work() -> Any:
        parts = da.linalg.svd_compressed(matrix, k, n_power_iter=4, iterator="QR", compute=False)
        return dask.compute(*parts)

    run = timed(work)
    u, s, _ = run["value"]
    return kept(run, s, u, keep)


def kept(run: dict[str, Any], s: np.ndarray, u: np.ndarray, keep: bool) -> dict[str, Any]:
    return run | {"value": [s.tolist(), u.tolist() if keep else None]}


def alignment(path: str, k: int, memory: str, keep: bool, other: str) -> dict[str, Any]:
    import lkarray as lk

    a, b = open_losses(path), open_losses(other)
    return timed(lambda: float(lk.cka(a, b, memory=memory)))


WAYS = {"lkarray": ours, "svd_compressed": theirs, "cka": alignment}


def accuracy(k: int, n: int, draws: int) -> None:
    """Print the errors of both against numpy in float64."""
    path = losses(n, 15, draws)
    x = open_losses(path).values.reshape(-1, n).astype(np.float64)
    reference = np.linalg.svd(x.T, full_matrices=False)
    options = {"path": str(path), "k": k, "memory": "1 GiB", "keep": True}
    errors = {}
    for way, run in compare(["lkarray", "svd_compressed"], options, 1).items():
        s, u = (np.asarray(array, np.float64) for array in run["value"])
        u = np.linalg.qr(u)[0]
        best = reference[0][:, :k]
        angle = np.degrees(np.arcsin(min(1, np.linalg.norm(u - best @ (best.T @ u), 2))))
        errors[way] = np.abs(s / reference[1][:k] - 1).max(), angle
        print(
            f"{way:16s} singular values off by {errors[way][0]:.1e}, largest angle {angle:.3f} deg"
        )
    ratio = errors["lkarray"][0] / errors["svd_compressed"][0]
    print(f"error of the singular values, lkarray / svd_compressed: {ratio:.3f}")


def definition(x: np.ndarray, y: np.ndarray) -> float:
    """CKA by its definition."""
    kernels = []
    for tensor in (x, y):
        flat = tensor.reshape(-1, tensor.shape[-1]).astype(np.float64)
        flat -= flat.mean(0)
        flat -= flat.mean(1, keepdims=True)
        kernels.append(flat.T @ flat)
    k, j = kernels
    return float((k * j).sum() / np.sqrt((k**2).sum() * (j**2).sum()))


def report() -> None:
    asked = arguments(__doc__)
    if main(WAYS, asked):
        return
    n, draws, k = (2000, 40, 10) if asked.small else (100_000, 500, 50)
    options = {"path": str(losses(n, 15, draws)), "k": k, "memory": "2 GiB", "keep": False}
    runs = compare(["svd_compressed", "lkarray"], options, 1 if asked.small else asked.repeats)
    table(runs, "svd_compressed", {"lkarray": 1.0})
    accuracy(*((10, 1000, 40) if asked.small else (50, 6000, 200)))

    n, chains, draws = (2000, 4, 30) if asked.small else (100_000, 4, 500)
    paths = [str(losses(n, chains, draws, seed)) for seed in (1, 2)]
    options = {"path": paths[0], "other": paths[1], "k": 0, "memory": "1 GiB", "keep": False}
    runs = compare(["cka"], options, 1)
    print(f"cka, n = {n}, S = {chains * draws}:")
    table(runs, "cka", {})
    few = [open_losses(losses(1000, 4, 30, seed)) for seed in (1, 2)]
    import lkarray as lk

    assert abs(float(lk.cka(*few)) - definition(*(x.values for x in few))) < 1e-4


if __name__ == "__main__":
    report()
