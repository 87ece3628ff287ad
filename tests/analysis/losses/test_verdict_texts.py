"""What diagnostics say of chains that stand still, and of sample sizes that cannot be."""

import re

import numpy as np
import pytest
import xarray as xr

import lkarray as lk


def losses_of(values):
    return xr.DataArray(values, dims=("chain", "draw", "sample"), name="loss")


@pytest.mark.parametrize("seed", range(3))
def test_verdicts__no_sample_size_beyond_the_draws(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, 8, 30)) + 20 * np.arange(2)[:, None, None]
    values[:, ::2] *= -0.9  # antithetic, so that ArviZ counts more draws than there are
    report = lk.diagnostics(losses_of(values))
    text = " ".join(report.attrs["verdicts"])
    assert "R-hat is above" in text
    sizes = re.findall(r"effective sample size (?:at most )?(\d+) of (\d+) draws", text)
    assert sizes
    assert all(int(size) <= int(draws) for size, draws in sizes)
    assert "at most" in text  # the chains disagree


def test_verdicts__chains_constant_each_at_its_own_value_are_told_in_words():
    rng = np.random.default_rng(0)
    values = np.broadcast_to(rng.normal(size=(4, 1, 20)), (4, 12, 20))
    text = " ".join(lk.diagnostics(losses_of(values)).attrs["verdicts"])
    assert "inf" not in text
    assert "nan" not in text
    assert not re.search(r"\d{5,}", text)
    assert "chains that stand still" in text
    assert "are all that there is of a typical loss variance" in text
    nearly = values + 1e-5 * rng.normal(size=values.shape)
    text = " ".join(lk.diagnostics(losses_of(nearly)).attrs["verdicts"])
    assert not re.search(r"\d{5,}", text)
    assert "are nearly all of a typical loss variance" in text


@pytest.mark.parametrize("lazy", [False, True])
def test_neighbors__an_index_with_values_twice_is_refused(lazy):
    rng = np.random.default_rng(0)
    losses = losses_of(rng.normal(size=(2, 20, 6))).assign_coords(sample=[3, 1, 4, 1, 5, 9])
    losses = losses.chunk(sample=3) if lazy else losses
    with pytest.raises(lk.errors.SchemaError, match="'sample' has values twice, 1 for one"):
        lk.neighbors(losses, k=2)
    assert lk.neighbors(losses.drop_vars("sample"), k=2).compute().sizes["sample"] == 6


def test_most_influential__an_index_with_values_twice_is_refused():
    rng = np.random.default_rng(0)
    influence = xr.DataArray(
        rng.normal(size=(4, 3)),
        dims=("example", "audit"),
        coords={"example": [0, 1, 1, 2]},
        name="influence",
    )
    with pytest.raises(lk.errors.SchemaError, match="'example' has values twice"):
        lk.most_influential(influence, k=2)
