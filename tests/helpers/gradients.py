"""Made gradient tensors."""

import numpy as np
import xarray as xr

SIZES = {"time": 5, "example": 12, "param": 30}


RATES = np.array([0.4, 0.3, 0.25, 0.1, 0.02])


WEIGHTS = {None: np.ones(5), "lr": RATES, "lr2": RATES**2}


def tensor(rng, dtype="float64", **sizes):
    sizes = SIZES | sizes
    return xr.DataArray(
        rng.normal(size=tuple(sizes.values())).astype(dtype),
        dims=tuple(sizes),
        coords={
            "time": np.arange(sizes["time"]) * 10,
            "learning_rate": ("time", np.resize(RATES, sizes["time"])),
            "label": ("example", np.arange(sizes["example"]) % 3),
        },
        name="gradient",
    )
