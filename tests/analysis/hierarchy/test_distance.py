import numpy as np
import pytest

import lkarray as lk
from tests.helpers.hierarchies import binary, taxonomic_losses


def test_correlation_by_distance__equals_means_over_pairs():
    taxonomy = binary(3)
    losses = taxonomic_losses(taxonomy)
    curve = lk.correlation_by_distance(losses.chunk(sample=5), taxonomy, replicates=30)
    r = lk.correlation(losses.astype(float)).values
    labels = losses["label"].values
    far = np.array([[taxonomy.distance(a, b) for b in labels] for a in labels])
    other = ~np.eye(len(labels), dtype=bool)
    for d in (0, 2, 4, 6):
        np.testing.assert_allclose(
            curve["correlation"].sel(distance=d), r[other & (far == d)].mean(), rtol=1e-5
        )
        assert curve["pairs"].sel(distance=d) == (other & (far == d)).sum()
    assert (np.diff(curve["correlation"]) < 0).all()
    assert curve["rank_correlation"] < -0.8
    assert curve["rank_low"] < curve["rank_correlation"] < curve["rank_high"]
    assert curve["label"].values.tolist() == list(taxonomy.order())
    part = lk.correlation_by_distance(losses, taxonomy, within="0", replicates=0)
    assert part["distance"].values.tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="only 2 of the labels"):
        lk.correlation_by_distance(losses, taxonomy, within="00")
