"""Made chains whose convergence is known, trees of them, and chains that are stopped."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import xarray as xr
from scipy.signal import lfilter

from lkarray.analysis.losses.diagnostics import diagnostics
from lkarray.sampling.chain import Stack


def autoregressive(
    rng: np.random.Generator, rho: float, *, chains: int = 4, draws: int = 500, samples: int = 40
) -> xr.DataArray:
    """Stationary AR(1) series of unit variance: those of different samples are independent."""
    noise = rng.normal(size=(chains, draws + 200, samples)) * np.sqrt(1 - rho**2)
    values = lfilter([1], [1, -rho], noise, axis=1)[:, 200:]
    return xr.DataArray(
        values.astype("f4"),
        dims=("chain", "draw", "sample"),
        coords={"chain": range(chains), "sample": np.arange(samples) * 3},
        name="loss",
    )


def tree_of(losses: xr.DataArray, *, hidden: list[str] | None = None, **attrs) -> xr.DataTree:
    """A tree as `lk.open` returns, with made-up statistics of draws."""
    accepted = attrs.pop("accepted", 0.9)
    settings = {"sampler": {"name": "SGLD", "step_size": 1e-3}, "gamma": 100.0, "burn_in": 50}
    settings |= {"thin": 1, **attrs}
    shape = (losses.sizes["chain"], losses.sizes["draw"])
    known = {"chain": losses["chain"]} if "chain" in losses.coords else {}
    per_draw = {
        "distance": np.tile(np.arange(shape[1], dtype="f4"), (shape[0], 1)),
        "step_size": np.full(shape, settings["sampler"]["step_size"], "f4"),
        "acceptance": np.full(shape, accepted, "f4"),
        "diverged": np.zeros(shape, bool),
    }
    stats = xr.Dataset({k: (("chain", "draw"), v) for k, v in per_draw.items()}, coords=known)
    groups = {"losses": losses.to_dataset(name="loss").assign_attrs(settings)}
    tree = xr.DataTree.from_dict({**groups, "sample_stats": stats})
    tree.attrs["hidden"] = hidden or []
    return tree


def said(tree, **options) -> str:
    """The one verdict on a tree."""
    (line,) = diagnostics(tree, **options).attrs["verdicts"]
    return line


def broken(losses: xr.DataArray) -> xr.DataArray:
    values = losses.values.copy()
    values[:, 2] = np.nan
    return losses.copy(data=values)


@contextmanager
def stopped_after(monkeypatch, steps):
    """Have chains be stopped, as by Ctrl-C, once so many steps of theirs were taken."""
    taken, count = Stack._step, iter(range(1000))

    def step(self):
        if next(count) == steps:
            raise KeyboardInterrupt
        taken(self)

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            yield
