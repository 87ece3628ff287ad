"""The engine on a GPU: against numpy in memory, the engine on the cores, and plain torch.

Dense correlation of n = 20,000 (Zarr to Zarr, and to memory); 30 neighbours of 50,000 and 200,000;
svd and cka of 100,000. S = 7,500. Plain torch holds everything on the device, and reads the same
Zarr. Prints seconds, ratios and TFLOP/s. Where there is no CUDA device (and with ``--small``) it
runs on ``device="cpu"`` at reduced sizes: whether all agree, not how fast they are. Run:
``python benchmarks/gpu_engine.py [--small]``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import FOLDER, arguments, losses, main, open_losses, timed_alone
from measure import compare as run_ways

BARS = {"dense, device": ("dense, torch", 2.0), "dense to memory, device": ("dense, torch", 2.0)}
K = 30


def _picked(r: Any) -> list[list[float]]:
    n = len(r)
    return np.asarray(r[:: max(n // 40, 1), :: max(n // 37, 1)]).tolist()


def _loaded(path: str) -> np.ndarray:
    import xarray as xr

    x = xr.open_zarr(path, consolidated=False, chunks=None)["loss"].values
    return x.reshape(-1, x.shape[-1])


def dense_numpy(path: str, device: str) -> dict[str, Any]:
    def work() -> list[list[float]]:
        x = _loaded(path)
        x -= x.mean(0)
        x /= np.linalg.norm(x, axis=0)
        return _picked(x.T @ x)

    return timed_alone(work)


def dense_torch(path: str, device: str) -> dict[str, Any]:
    import torch

    torch.zeros(1, device=device)

    def work() -> list[list[float]]:
        x = torch.from_numpy(_loaded(path)).to(device)
        x -= x.mean(0)
        x /= torch.linalg.norm(x, dim=0)
        return _picked((x.T @ x).cpu().numpy())

    return timed_alone(work)


def dense(path: str, device: str | None) -> dict[str, Any]:
    import lkarray as lk

    out = FOLDER / "gpu-kernel.zarr"
    shutil.rmtree(out, ignore_errors=True)
    kernel = lk.correlation(open_losses(path), device=device)
    run = timed_alone(lambda: lk.save(kernel, out))
    run["value"] = _picked(run["value"].values)
    shutil.rmtree(out, ignore_errors=True)
    return run


def dense_to_memory(path: str, device: str) -> dict[str, Any]:
    import lkarray as lk

    kernel = lk.correlation(open_losses(path), device=device)
    run = timed_alone(kernel.compute)
    run["value"] = _picked(run["value"].values)
    return run


def neighbours(path: str, device: str | None) -> dict[str, Any]:
    import lkarray as lk

    near = lk.neighbors(open_losses(path), K, precision="float32", device=device)
    run = timed_alone(near.compute)
    run["value"] = run["value"]["similarity"][::97][:100].values.tolist()
    return run


def modes(path: str, device: str | None) -> dict[str, Any]:
    import lkarray as lk

    modes = lk.svd(open_losses(path), 10, over=("chain", "draw"), center="pooled", device=device)
    run = timed_alone(lambda: modes.compute())
    run["value"] = run["value"]["singular_value"].values.tolist()
    return run


def alignment(path: str, device: str | None) -> dict[str, Any]:
    import lkarray as lk

    x = open_losses(path)
    value = lk.cka(x, x[:, ::2], device=device)
    return timed_alone(lambda: float(value.compute()))


def on_cores(way: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda path, device: way(path, None)


WAYS = {
    "dense, numpy": dense_numpy,
    "dense, torch": dense_torch,
    "dense, cores": on_cores(dense),
    "dense, device": dense,
    "dense to memory, device": dense_to_memory,
    "neighbours, cores": on_cores(neighbours),
    "neighbours, device": neighbours,
    "svd, cores": on_cores(modes),
    "svd, device": modes,
    "cka, cores": on_cores(alignment),
    "cka, device": alignment,
}


def section(title: str, ways: list[str], path: str, device: str, operations: float) -> None:
    """Run some ways, print them against the first, and see that all agree."""
    runs = run_ways(ways, {"path": path, "device": device}, 1)
    print(title)
    for way, run in runs.items():
        rate = operations / run["seconds"] / 1e12
        ratio = run["seconds"] / runs[ways[0]]["seconds"]
        print(f"  {way:26s} {run['seconds']:8.2f} s {ratio:7.2f} {rate:8.2f} TFLOP/s", end="")
        if way in BARS:
            other, bar = BARS[way]
            against = run["seconds"] / runs[other]["seconds"]
            met = "met" if against <= bar else "NOT met"
            met = met if device == "cuda" else "for a GPU only"
            print(f"  {against:.2f} of {other}, bar {bar}: {met}", end="")
        print()
        scale = np.abs(runs[ways[0]]["value"]).max()
        expected = np.array(runs[ways[0]]["value"])
        np.testing.assert_allclose(run["value"], expected, atol=1e-4 * scale, err_msg=way)


def report() -> None:
    asked = arguments(__doc__)
    if main(WAYS, asked):
        return
    import torch

    cuda = torch.cuda.is_available()
    small = asked.small or not cuda
    device = "cuda" if cuda else "cpu"
    print(f"device {torch.cuda.get_device_name() if cuda else 'cpu: agreement only, no figures'}")
    draws = 20 if small else 500
    length = 15 * draws
    n = 400 if small else 20_000
    path = str(losses(n, 15, draws))
    ways = [way for way in WAYS if way.startswith("dense")]
    section(f"dense, n = {n}", ways, path, device, n**2 * length)
    for n in (300, 600) if small else (50_000, 200_000):
        path = str(losses(n, 15, draws))
        ways = ["neighbours, cores", "neighbours, device"]
        if n == 200_000:  # an hour on the cores
            ways = ways[1:]
        section(f"{K} neighbours, n = {n}", ways, path, device, n**2 * length)
    n = 600 if small else 100_000
    path = str(losses(n, 15, draws))
    for what, operations in (("svd", 2 * n * length**2), ("cka", 4.5 * n * length**2)):
        ways = [way for way in WAYS if way.startswith(what)]
        if not small:
            ways = ways[1:]  # minutes on the cores
        section(f"{what}, n = {n}", ways, path, device, operations)


if __name__ == "__main__":
    report()
