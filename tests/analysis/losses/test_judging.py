"""A verdict is computed once, and carried on by what is made of the losses."""

import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import plots
from lkarray.errors import UnreliableWarning
from tests.helpers.losses import Forbidding, random_losses


@pytest.fixture
def judged(rng):
    shared = rng.normal(size=(4, 60, 3)) @ rng.normal(size=(3, 30))
    losses = xr.DataArray(shared, dims=("chain", "draw", "sample"), name="loss")
    losses = losses.assign_coords(sample=np.arange(30), label=("sample", np.arange(30) % 3))
    return lk.judge(losses)


def test_judge__gives_losses_the_numbers_of_their_functions(judged):
    assert judged.attrs["reliability"] == pytest.approx(float(lk.reliability(judged)))
    assert judged.attrs["rhat"] == float(lk.diagnostics(judged)["rhat"].max())
    assert judged.attrs["judged"] == [4, 60]
    assert "acceptance" not in judged.attrs


def test_verdict__travels_without_being_computed(judged):
    with dask.config.set(scheduler=Forbidding()):
        lazy = judged.copy(data=judged.chunk().data)
        made = [
            lk.neighbors(lazy, 3),
            lk.neighbors(lazy, 3, crossfit=True),
            lk.group_mean(lazy, "label"),
            lk.correlation(lazy),
            lk.covariance(lazy),
        ]
    for result in made:
        assert result.attrs["reliability"] == judged.attrs["reliability"]
    points = lk.embed(made[0])
    assert points.attrs["rhat"] == judged.attrs["rhat"]
    for figure in (
        plots.neighbor_map(points, by="label"),
        plots.kernel_matrix(made[3], by="label"),
    ):
        (text,) = [text.get_text() for text in figure.texts]
        assert text.startswith(
            f"reliability of R {judged.attrs['reliability']:.2f}, worst R-hat 1."
        )
    for fewer in (judged.isel(chain=slice(2)), judged.isel(draw=slice(30))):
        assert "reliability" not in lk.correlation(fewer).attrs


def test_verdict__of_a_tree_has_the_acceptance(rng):
    losses = random_losses(rng, chains=3, draws=20).to_dataset(name="loss")
    stats = xr.Dataset({"acceptance": (("chain", "draw"), np.full((3, 20), 0.25))})
    tree = xr.DataTree.from_dict({"losses": losses, "sample_stats": stats})
    judged = lk.judge(tree)
    assert "reliability" not in tree["losses/loss"].attrs
    assert judged["losses/loss"].attrs["acceptance"] == 0.25
    with pytest.warns(UnreliableWarning, match="acceptance 0.25: .*reduce step_size"):
        lk.neighbors(judged, 3)


def test_verdict__below_a_floor_warns_once_and_names_the_remedy(rng, recwarn):
    noise = random_losses(rng, chains=4, draws=30)
    noise = lk.judge(noise.copy(data=rng.normal(size=noise.shape)))
    with pytest.warns(UnreliableWarning, match=r"most of R is noise; .*crossfit=True"):
        lk.neighbors(noise, 3)
    recwarn.clear()
    lk.correlation(noise)
    assert not recwarn.list
