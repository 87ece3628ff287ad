import numpy as np
import pytest

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import numpy_correlation, numpy_covariance, random_losses


@pytest.mark.parametrize("kernel", ["correlation", "covariance"])
@pytest.mark.parametrize("groups", ["label", None])
@pytest.mark.parametrize("memory", [None, "100 KiB"])
def test_histogram__counts_every_pair_once(rng, kernel, groups, memory):
    losses = random_losses(rng, samples=60)
    whole = (numpy_correlation if kernel == "correlation" else numpy_covariance)(losses)
    bounds = (-0.5, 0.6) if kernel == "correlation" else (-3.0, 4.0)
    histogram = lk.histogram(
        losses, groups, bins=7, bounds=bounds, kernel=kernel, memory=memory
    ).compute()
    total = histogram["count"].sum("bin") + histogram["below"] + histogram["above"]
    assert int(total.sum()) == 60 * 59
    labels = losses["label"].values if groups else np.zeros(60, int)
    name = groups or "group"
    assert histogram["count"].dims == (name, f"{name}_2", "bin")
    for a in histogram[name].values:
        for b in histogram[f"{name}_2"].values:
            pairs = (labels[:, None] == a) & (labels == b) & ~np.eye(60, dtype=bool)
            at = {name: a, f"{name}_2": b}
            counts, edges = np.histogram(whole[pairs], 7, bounds)
            np.testing.assert_array_equal(histogram["count"].sel(at), counts)
            np.testing.assert_allclose(histogram["bin_left"], edges[:-1])
            assert int(histogram["below"].sel(at)) == (whole[pairs] < bounds[0]).sum()


def test_histogram__refuses_unclear_requests(rng):
    losses = random_losses(rng)
    with pytest.raises(ValueError, match="loss_variance"):
        lk.histogram(losses, kernel="covariance")
    with pytest.raises(ValueError, match="ascend"):
        lk.histogram(losses, bounds=(1, -1))
    with pytest.raises(errors.SchemaError, match="no coordinate"):
        lk.histogram(losses, "colour")
