"""Log-odds of losses that were stored without them."""

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from torch.nn import functional as F
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.errors import SchemaError
from tests.helpers.networks import classification, small_network

DIMS = ("chain", "draw", "sample")


def losses_of(odds, dtype=np.float64, **attrs):
    """Losses as a network in that precision makes them of two logits, in a node."""
    scores = torch.stack([torch.zeros(odds.shape), torch.from_numpy(odds)], -1)
    scores = scores.to(torch.float32 if dtype == np.float32 else torch.float64)
    target = torch.zeros(odds.size, dtype=torch.long)
    loss = F.cross_entropy(scores.reshape(-1, 2), target, reduction="none").numpy()
    return xr.Dataset({"loss": (DIMS, loss.reshape(odds.shape))}, attrs=attrs)


def test_log_odds__are_those_that_made_the_losses():
    odds = np.random.default_rng(0).uniform(-13, 90, (2, 30, 4))
    again = lk.log_odds(losses_of(odds))
    np.testing.assert_allclose(again["log_odds"], odds, rtol=1e-9)
    assert again["log_odds"].attrs["link"] == "softplus"
    assert again["log_odds"].dtype == np.float64
    assert not again["floored"].any()
    narrow = lk.log_odds(losses_of(odds, np.float32))
    some = odds > -3  # of less than that float32 has lost digits
    np.testing.assert_allclose(narrow["log_odds"].values[some], odds[some], rtol=1e-5, atol=1e-5)


def test_log_odds__say_how_many_are_at_the_floor():
    odds = np.full((1, 4, 3), -2.0)
    odds[0, :, 1] = -40
    odds[0, 0, 2] = -40
    both = lk.log_odds(losses_of(odds, np.float32, loss="cross_entropy"))
    assert both["floored"].values.tolist() == [0, 1, 0.25]
    floor = np.log(np.expm1(2.0**-24))
    np.testing.assert_allclose(both["log_odds"].values[0, :, 1], floor)
    assert both.attrs["least_loss"] == 2.0**-24
    # Losses of one logit are not made by way of a sum of 1: they go on where it ends.
    fine = losses_of(np.zeros((1, 1, 1)), np.float32, loss="binary_cross_entropy")
    fine["loss"][:] = np.float32(np.exp(-40.0))
    assert lk.log_odds(fine)["log_odds"].item() == pytest.approx(-40, rel=1e-6)
    assert lk.log_odds(fine)["floored"].item() == 0


def test_log_odds__are_lazy_keep_labels_and_padding():
    odds = np.random.default_rng(0).normal(size=(2, 5, 3))
    ds = losses_of(odds).assign_coords(label=("sample", ["a", "b", "c"]))
    ds["loss"] = ds["loss"].expand_dims(token=2, axis=-1).copy()
    ds["loss"][..., 2, 1] = np.nan
    both = lk.log_odds(ds.chunk(draw=2))
    assert isinstance(both["log_odds"].data, da.Array)
    assert isinstance(both["floored"].data, da.Array)
    assert both["label"].values.tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(both["log_odds"][..., 0], odds, rtol=1e-9, atol=1e-12)
    assert both["log_odds"].isnull().values.nonzero()[2].tolist() == [2] * 10
    assert both["floored"].isnull().values.tolist() == [[False] * 2] * 2 + [[False, True]]


def test_log_odds__that_are_stored_are_taken():
    data = classification(n=12)
    posterior = lk.LocalPosterior(small_network(), data, nbeta=10.0, gamma=50.0)
    options = {"sampler": lk.SGLD(step_size=1e-3), "chains": 2, "draws": 4, "progress": False}
    both = lk.sample(posterior, data, store=MemoryStore(), outcomes=("loss", "log_odds"), **options)
    alone = lk.sample(posterior, data, store=MemoryStore(), **options)
    stored, made = lk.log_odds(both)["log_odds"], lk.log_odds(alone)["log_odds"]
    np.testing.assert_array_equal(stored, both["losses/log_odds"])
    np.testing.assert_allclose(stored, made, rtol=1e-4, atol=1e-5)
    assert stored.attrs == made.attrs == both["losses/log_odds"].attrs
    # Wherever losses are taken, so is this.
    expected = lk.correlation(both["losses/log_odds"])
    np.testing.assert_allclose(lk.correlation(lk.log_odds(alone)), expected, atol=1e-3)
    assert lk.covariance(lk.log_odds(alone)).attrs["units"] == "1"
    xr.testing.assert_identical(alone.lk.log_odds(), lk.log_odds(alone))
    with pytest.raises(SchemaError, match="an outcome itself"):
        lk.log_odds(both["losses/log_odds"])


@pytest.mark.parametrize("loss", ["mse", "next_token_mean", "margin@0123"])
def test_log_odds__of_other_losses_are_refused(loss):
    with pytest.raises(SchemaError, match=f"'{loss}'.*cross_entropy"):
        lk.log_odds(losses_of(np.zeros((1, 2, 2)), loss=loss))
