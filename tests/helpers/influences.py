"""Made influences of an audit, and what it adds up to by epochs."""

import numpy as np
import xarray as xr

from lkarray.kernels.kinds import INFLUENCE_OPERATOR

M, N, OUTPUTS, LAYERS, EPOCHS = 57, 9, 3, 2, 4
CHUNKS = {"example": 10, "audit": 4, "layer": 1, "epoch": 1}
FULL = ("example", "audit", "output", "layer", "epoch")


def influence(rng, dims=FULL):
    sizes = dict(zip(FULL, (M, N, OUTPUTS, LAYERS, EPOCHS), strict=True))
    coords = {
        "example": np.arange(M) * 2 + 5,
        "train_label": ("example", rng.integers(0, 5, M)),
        "label": ("audit", rng.integers(0, 5, N)),
        "layer": ["conv", "dense"],
        "epoch": np.arange(EPOCHS) + 1,
    }
    kept = {
        name: c for name, c in coords.items() if (c[0] if isinstance(c, tuple) else name) in dims
    }
    return xr.DataArray(
        rng.normal(size=[sizes[dim] for dim in dims]).astype("f4"),
        dims=dims,
        coords=kept,
        name="influence",
        attrs={"kernel": INFLUENCE_OPERATOR, "units": "nat"},
    )


def cut(x, chunks=CHUNKS):
    return x.chunk({dim: size for dim, size in chunks.items() if dim in x.dims})


def summed(x):
    return x.astype(float).sum([dim for dim in ("layer", "epoch", "window") if dim in x.dims])


def by_epochs(rng):
    true = rng.normal(size=(EPOCHS, N)).cumsum(0)
    rebuilt = true + 0.1 * rng.normal(size=true.shape)
    return xr.Dataset(
        {
            "reconstruction": (("epoch", "audit"), rebuilt),
            "epoch_change": (("epoch", "audit"), true, {"units": "nat"}),
        },
        coords={"epoch": np.arange(EPOCHS) + 1},
        attrs={"complete": True, "mre": 0.1},
    )
