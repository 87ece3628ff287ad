"""Taxonomic lift of a table of a million inputs, 30 neighbours each, 1,000 classes of ImageNet.

The table lies on disk as Zarr. "table" reads it whole first, "lazy" leaves that to Dask; "counts"
is the least that there is to do: read it and count pairs of labels with numpy. Bars: 10 s, 2 GiB.
Run: ``python benchmarks/lift.py [--small]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from measure import FOLDER, arguments, compare, main, table, timed

SECONDS, MIB = 10, 2048


def make(n: int, k: int) -> Path:
    """Write random neighbours, one in four drawn from the same thousandth of the inputs."""
    import xarray as xr

    path = FOLDER / f"neighbors-{n}-{k}.zarr"
    partial = path.with_suffix(".partial")
    if not path.exists():
        rng = np.random.default_rng(0)
        near = rng.integers(0, n, (n, k))
        close = rng.random((n, k)) < 0.25
        near[close] = near[close] % (n // 1000 or 1) * 1000 % n
        xr.Dataset(
            {"neighbor": (("sample", "rank"), near)},
            coords={
                "sample": np.arange(n),
                "label": ("sample", rng.integers(0, 1000, n)),
            },
        ).chunk(sample=2**16).to_zarr(partial, mode="w", consolidated=False, zarr_format=3)
        partial.replace(path)
    return path


def work(path: str, chunks: Any) -> dict[str, Any]:
    import xarray as xr

    import lkarray as lk

    taxonomy = lk.Taxonomy.imagenet()

    def lift() -> list[float]:
        ds = xr.open_zarr(path, consolidated=False, chunks=chunks)
        return lk.taxonomic_lift(ds, taxonomy)["pooled_lift"].fillna(0).values.tolist()

    return timed(lift)


def whole(path: str) -> dict[str, Any]:
    return work(path, None)


def lazy(path: str) -> dict[str, Any]:
    return work(path, {})


def counts(path: str) -> dict[str, Any]:
    import xarray as xr

    def count() -> list[float]:
        ds = xr.open_zarr(path, consolidated=False, chunks=None)
        label, near = ds["label"].values, ds["neighbor"].values
        key = label[:, None] * 1000 + label[near]
        return [float(np.bincount(key.ravel(), minlength=10**6)[0])]

    return timed(count)


WAYS = {"counts": counts, "table": whole, "lazy": lazy}

if __name__ == "__main__":
    asked = arguments(__doc__)
    if not main(WAYS, asked):
        n = 20_000 if asked.small else 1_000_000
        repeats = 1 if asked.small else asked.repeats
        ways = compare(list(WAYS), {"path": str(make(n, 30))}, repeats)
        assert np.allclose(ways["table"]["value"], ways["lazy"]["value"])
        print(f"lift of {n:,} inputs, 30 neighbours, 1,000 classes, 200 resamplings")
        table(ways, "counts", {})
        worst = max(("table", "lazy"), key=lambda way: ways[way]["seconds"])
        met = ways[worst]["seconds"] <= SECONDS and ways[worst]["mib"] <= MIB
        print(f"bar {SECONDS} s and {MIB} MiB: {'met' if met else 'NOT met'}")
