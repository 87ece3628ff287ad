import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage

import lkarray as lk
from tests.helpers.losses import numpy_covariance, random_losses


@pytest.mark.parametrize("samples", [20, 150])
def test_shrinkage__equals_sklearn(rng, samples):
    losses = random_losses(rng, samples=samples)
    flat = losses.values.reshape(-1, samples).astype("f8")
    share = ledoit_wolf_shrinkage(flat)
    lazy = losses.chunk(chain=1, sample=40)
    assert float(lk.ledoit_wolf(lazy, memory="2 MiB")) == pytest.approx(share, rel=1e-5)
    plain = numpy_covariance(losses)
    for asked, used in (("ledoit-wolf", share), (0.3, 0.3), (0.0, 0.0)):
        shrunk = lk.covariance(lazy, shrinkage=asked, memory="2 MiB")
        expected = (1 - used) * plain + used * np.trace(plain) / samples * np.eye(samples)
        np.testing.assert_allclose(shrunk, expected, rtol=1e-4, atol=1e-4)
    for wrong in (1.5, "oas"):
        with pytest.raises(ValueError, match="ledoit-wolf"):
            lk.covariance(losses, shrinkage=wrong)
    with pytest.raises(ValueError, match="without y"):
        lk.covariance(losses, losses, shrinkage=0.1)
