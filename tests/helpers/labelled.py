"""Results of samples whose names are not their positions."""

import numpy as np
import xarray as xr

import lkarray as lk

N = 24
ORDER = np.random.default_rng(7).permutation(N)
INDEX = np.arange(N) * 3 + 5  # the samples' names, which are not their positions


def losses():
    """Losses of samples with an index, in groups."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 30, 3)) @ rng.normal(size=(3, N)) + rng.normal(size=(4, 30, N))
    coords = {"sample": INDEX, "label": ("sample", np.arange(N) % 4)}
    return xr.DataArray(values, dims=("chain", "draw", "sample"), coords=coords, name="loss")


def things(losses):
    """Results of these losses, by name."""
    R = lk.correlation(losses).compute()
    near = lk.neighbors(losses, 4).compute()
    rng = np.random.default_rng(1)
    audit = xr.DataArray(
        rng.normal(size=(N, 3)), dims=("example", "audit"), coords={"example": INDEX}
    )
    points = R[:, :2].rename(sample_2="component").drop_vars(["component", "label_2"])
    tree = lk.Taxonomy.from_parents({0: "a", 1: "a", 2: "b", 3: "b", "a": "r", "b": "r"})
    hidden = xr.DataArray(
        rng.normal(size=(N, 5)), dims=("example", "unit"), coords={"example": INDEX}
    )
    return {
        "R": R,
        "near": near,
        "audit": audit,
        "points": points,
        "tree": tree,
        "hidden": hidden,
        "losses": losses,
        "bare": losses.drop_vars("label"),
    }
