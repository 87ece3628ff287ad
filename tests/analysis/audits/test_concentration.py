import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from tests.helpers.influences import M, cut, influence, summed


@pytest.fixture(params=["memory", "dask"])
def audit(request, rng):
    x = influence(rng)
    return (cut(x) if request.param == "dask" else x).to_dataset()


def test_concentration__is_the_share_of_the_largest(audit):
    share = lk.concentration(audit)
    size = np.sort(np.abs(summed(audit["influence"]).values), axis=0)[::-1]
    counts = share["examples"].values
    np.testing.assert_allclose(share, (size.cumsum(0) / size.sum(0))[counts - 1])
    assert share.dims == ("examples", "audit", "output")
    assert (counts[0], counts[-1]) == (1, M)
    assert share["label"].dims == ("audit",)


def test_concentration__has_few_points_and_no_share_of_nothing(rng):
    x = xr.DataArray(rng.normal(size=(30_000, 2)), dims=("example", "audit"))
    share = lk.concentration(x.chunk({"example": 7_000}) * [1, 0])
    counts = share["examples"].values
    assert len(counts) <= 200
    assert counts[-1] == 30_000
    assert (np.diff(counts) > 0).all()
    assert float(share[-1, 0]) == pytest.approx(1)
    assert np.isnan(share[:, 1]).all()
