"""Settings of short runs in a store, and their losses."""

import lkarray as lk

OPTIONS = {
    "sampler": lk.SGLD(step_size=1e-3),
    "chains": 3,
    "draws": 55,
    "burn_in": 3,
    "thin": 2,
    "batch_size": 16,
    "progress": False,
}


def losses_of(tree, group="losses"):
    return tree[f"{group}/loss"].values
