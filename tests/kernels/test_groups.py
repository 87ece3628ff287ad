import numpy as np
import pytest

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import numpy_correlation, numpy_covariance, random_losses


@pytest.mark.parametrize("samples", [30, 150])
@pytest.mark.parametrize("kernel", ["correlation", "covariance"])
@pytest.mark.parametrize("self_pairs", [True, False])
def test_group_mean__equals_the_mean_of_the_blocks(rng, samples, kernel, self_pairs):
    losses = random_losses(rng, samples=samples)
    label = np.array(["cat", "dog", "eel"])[rng.integers(0, 3, samples)]
    label[4] = "ox"
    losses = losses.assign_coords(animal=("sample", label)).chunk(draw=7, sample=40)
    mean = lk.group_mean(
        losses, "animal", kernel=kernel, self_pairs=self_pairs, memory="500 KiB"
    ).compute()
    assert mean.dims == ("animal", "animal_2")
    whole = (numpy_correlation if kernel == "correlation" else numpy_covariance)(losses.compute())
    if not self_pairs:
        np.fill_diagonal(whole, np.nan)
    for a in mean["animal"].values:
        for b in mean["animal"].values:
            block = whole[np.ix_(label == a, label == b)]
            block = block[np.isfinite(block)]
            expected = block.mean() if len(block) else np.nan
            np.testing.assert_allclose(
                mean.sel(animal=a, animal_2=b), expected, rtol=1e-4, atol=1e-5
            )
    bare = lk.group_mean(losses, label, kernel=kernel)
    assert bare.dims == ("group", "group_2")
    with pytest.raises(errors.SchemaError, match="no coordinate.*'animal', 'label'"):
        lk.group_mean(losses, "colour")
    with pytest.raises(errors.SchemaError, match="one label"):
        lk.group_mean(losses, label[:3])
