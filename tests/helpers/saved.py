"""A store with results and with what others put there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

import lkarray as lk
from lkarray import store as stores
from tests.helpers.losses import kernel


def full_store(path: Path) -> Path:
    """Make a store with losses, a kernel, a result, and something else by the user."""
    root = stores.create_run(
        path,
        chains=1,
        draws=40,
        sets=[stores.LossSet("losses", {"sample": np.arange(3)}, np.zeros(3, "f4"))],
        observables={},
        state={"parameters": 2},
        state_dtype="float32",
        fingerprint={"state": ["parameters"]},
    )
    lk.save(kernel(), path, "derived/k")
    lk.save(kernel(), path, "mine")
    stores.put(path, "means", xr.DataArray([1.0, 2.0], dims="x", name="means"))
    root.create_array("alone", shape=(2,), dtype="f4", chunks=(2,), dimension_names=["pair"])[:] = 1
    xr.Dataset({"v": ("x", [1, 2])}).to_zarr(
        path, group="theirs/inner", consolidated=False, zarr_format=3, mode="a"
    )
    (path / "notes").mkdir()
    (path / "notes/thesis.tex").write_text("years of work")
    return path
